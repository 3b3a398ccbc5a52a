/** Shows the widgets of a node that count beside the values of its others. When they do, its definition says. */

import { hide, linkedWidgets, onChange } from "./hiding.js";

/**
 * @typedef {Object<string, {is?: Array, not?: Array, linked?: boolean}>} Condition all of which must hold of other inputs
 * @typedef {Object<string, Condition[]>} Rules by the widget's name: one of its conditions is enough
 */

/**
 * @param {Object} definition of a node's class, as ComfyUI's server sends it
 * @returns {Rules | null} null where every widget counts always
 */
export function rulesOf({ input }) {
  const inputs = Object.entries({ ...input?.required, ...input?.optional });
  const found = inputs.filter(([, [, options]]) => options?.counts_when).map(([name, [, { counts_when: when }]]) => [name, when]);
  return found.length ? Object.fromEntries(found) : null;
}

/**
 * Hides the widgets that do not count, and shows those that do; one that is linked stays.
 * @param {Object} node with `widgets` and `inputs`, as ComfyUI has it
 * @param {Rules} rules
 * @returns {boolean} whether anything changed
 */
export function showWhatCounts(node, rules) {
  const linked = linkedWidgets(node);
  let changed = false;
  for (const widget of node.widgets ?? []) {
    if (!rules[widget.name]) continue;
    const hidden = !linked.has(widget.name) && !counts(node, linked, rules[widget.name]);
    changed ||= Boolean(widget.hidden) !== hidden;
    for (const each of [widget, ...(widget.linkedWidgets ?? [])]) hide(each, hidden);
  }
  return changed;
}

/**
 * Calls back when something was chosen or connected that decides what counts.
 * @param {Object} node as above
 * @param {Rules} rules
 * @param {() => void} changed
 */
export function onDeciding(node, rules, changed) {
  onChange(node, new Set(Object.values(rules).flat().flatMap(Object.keys)), changed);
  const before = node.onConnectionsChange;
  node.onConnectionsChange = function (...given) {
    const result = before?.apply(this, given);
    changed();
    return result;
  };
}

function counts(node, linked, conditions) {
  return conditions.some((condition) => Object.entries(condition).every(([name, test]) => holds(node, linked, name, test)));
}

/** Whether a test holds; what a linked widget will be is not known, so it may. */
function holds(node, linked, name, { is, not, linked: wanted }) {
  if (wanted !== undefined) return (node.inputs ?? []).some((each) => each.name === name && each.link != null) === wanted;
  if (linked.has(name)) return true;
  const value = node.widgets?.find((each) => each.name === name)?.value;
  return is ? is.includes(value) : !not.includes(value);
}
