/** What the train node shows: with a recipe only what is usually changed, else everything. */

export const EXPERT = "expert";
export const USUAL = ["steps", "batch_size", "learning_rate", "seed", "control_after_generate", "output_name", "recipe"];

/** Size of a widget that takes no room; the canvas adds 4 to each height. */
const NO_ROW = () => [0, -4];

/**
 * Hides the widgets that a recipe has no need of; one that is linked stays, and so does what is no input (the panel).
 * @param {Object} node with `widgets` and `inputs`, as ComfyUI has it
 * @returns {boolean} whether anything changed
 */
export function showWhatIsUsual(node) {
  const recipe = node.widgets?.find(({ name }) => name === "recipe");
  if (!recipe) return false;
  const linked = new Set((node.inputs ?? []).filter(({ link }) => link != null).map(({ widget }) => widget?.name));
  let changed = false;
  for (const widget of node.widgets) {
    if (widget.element) continue;
    const hidden = recipe.value !== EXPERT && !USUAL.includes(widget.name) && !linked.has(widget.name);
    changed ||= Boolean(widget.hidden) !== hidden;
    hide(widget, hidden);
  }
  return changed;
}

/** Hides a widget or shows it again. The canvas of ComfyUI 0.3.64 would leave its row empty, so it takes none. */
function hide(widget, hidden) {
  widget.hidden = hidden;
  (widget.options ??= {}).hidden = hidden; // nodes 2.0 look here
  if (hidden) widget.computeSize = NO_ROW;
  else if (widget.computeSize === NO_ROW) delete widget.computeSize; // its class may have one
}

/**
 * Calls back when another recipe is chosen.
 * @param {Object} node as above
 * @param {() => void} changed
 */
export function onRecipe(node, changed) {
  const recipe = node.widgets?.find(({ name }) => name === "recipe");
  if (!recipe) return;
  const before = recipe.callback;
  recipe.callback = function (...given) {
    const result = before?.apply(this, given);
    changed();
    return result;
  };
}
