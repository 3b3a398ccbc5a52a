/** Hides widgets of a node, whose values stay and are sent as before. */

/** Size of a widget that takes no room; the canvas adds 4 to each height. */
const NO_ROW = () => [0, -4];

/** Hides a widget or shows it again. The canvas of ComfyUI 0.3.64 would leave its row empty, so it takes none. */
export function hide(widget, hidden) {
  widget.hidden = hidden;
  (widget.options ??= {}).hidden = hidden; // nodes 2.0 look here
  if (hidden) widget.computeSize = NO_ROW;
  else if (widget.computeSize === NO_ROW) delete widget.computeSize; // its class may have one
}

/** Names of a node's widgets that something is connected to. */
export function linkedWidgets({ inputs }) {
  return new Set((inputs ?? []).filter(({ link }) => link != null).map(({ widget }) => widget?.name));
}

/**
 * Calls back when a widget was given another value by hand.
 * @param {Object} node as ComfyUI has it
 * @param {Iterable<string>} names of its widgets
 * @param {() => void} changed
 */
export function onChange(node, names, changed) {
  for (const name of names) {
    const widget = node.widgets?.find((each) => each.name === name);
    if (!widget) continue;
    const before = widget.callback;
    widget.callback = function (...given) {
      const result = before?.apply(this, given);
      changed();
      return result;
    };
  }
}
