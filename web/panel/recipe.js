/** What the train node shows: with a recipe only what is usually changed, else everything. */

import { hide, linkedWidgets, onChange } from "./hiding.js";

export const EXPERT = "expert";
export const USUAL = ["steps", "batch_size", "learning_rate", "seed", "control_after_generate", "output_name", "recipe"];

/**
 * Hides the widgets that a recipe has no need of; one that is linked stays, and so does what is no input (the panel).
 * @param {Object} node with `widgets` and `inputs`, as ComfyUI has it
 * @returns {boolean} whether anything changed
 */
export function showWhatIsUsual(node) {
  const recipe = node.widgets?.find(({ name }) => name === "recipe");
  if (!recipe) return false;
  const linked = linkedWidgets(node);
  let changed = false;
  for (const widget of node.widgets) {
    if (widget.element) continue;
    const hidden = recipe.value !== EXPERT && !USUAL.includes(widget.name) && !linked.has(widget.name);
    changed ||= Boolean(widget.hidden) !== hidden;
    hide(widget, hidden);
  }
  return changed;
}

/**
 * Calls back when another recipe is chosen.
 * @param {Object} node as above
 * @param {() => void} changed
 */
export function onRecipe(node, changed) {
  onChange(node, ["recipe"], changed);
}
