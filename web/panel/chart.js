/** A run's curves, by uPlot. */

import uPlot from "../lib/uPlot-1.6.32.mjs";
import { element, setText } from "./elements.js";
import { number } from "./format.js";
import { smoothed, spanOf } from "./smooth.js";

const HEIGHT = 158;
const SMOOTH = "#4ea8ff", RAW = "rgba(78, 168, 255, 0.38)", VALIDATION = "#ffb454", RATE = "#6fd48a", NORM = "#cf9bff";

/** What can be looked at: a title, its curves, and their values for a run (the first row is the steps). */
export const VIEWS = {
  loss: {
    title: "Loss",
    help: "Loss of the steps, its running mean, and the validation loss",
    curves: [
      { label: "step", stroke: RAW, width: 1 },
      { label: "smoothed", stroke: SMOOTH, width: 2 },
      { label: "validation", stroke: VALIDATION, width: 2, spanGaps: true, points: { show: true, size: 5, fill: VALIDATION } },
    ],
    data: ({ points, validation, steps }) => {
      const smooth = smoothed(points.steps, points.loss, spanOf(steps));
      const trained = [points.steps, points.loss, smooth];
      return validation.steps.length ? joined(trained, validation) : [...trained, points.steps.map(() => null)];
    },
  },
  rate: {
    title: "Learning rate",
    help: "Learning rate of the network's layers",
    curves: [{ label: "learning rate", stroke: RATE, width: 2 }],
    data: ({ points }) => [points.steps, points.rate],
  },
  norm: {
    title: "Gradient norm",
    help: "Length of the gradient before clipping",
    curves: [{ label: "gradient norm", stroke: NORM, width: 1.5 }],
    data: ({ points }) => [points.steps, points.norm],
  },
};

/** A chart of fixed height with its legend; draws what `show` is given. */
export class Chart {
  /** @param {string} view name in VIEWS */
  constructor(view = "loss") {
    this.legend = element("div", { className: "d2f-legend" });
    this.holder = element("div", { className: "d2f-chart" });
    this.empty = element("div", { className: "d2f-empty" }, "The curve begins with the first step.");
    this.root = element("div", {}, this.legend, this.holder);
    this.view = VIEWS[view];
    this.data = [[]];
    this.resized = new ResizeObserver(() => this.#resize());
    this.resized.observe(this.holder);
    this.#build();
  }

  /** Looks at something else. */
  look(view) {
    this.view = VIEWS[view];
    this.#build();
  }

  /** Draws the run as it is now. */
  show(run) {
    this.data = this.view.data(run);
    this.empty.hidden = this.data[0].length > 0;
    this.plot.setData(this.data);
    this.#values();
  }

  /** Lets go of everything. */
  close() {
    this.resized.disconnect();
    this.plot.destroy();
  }

  #build() {
    this.plot?.destroy();
    this.chips = this.view.curves.map(({ label, stroke }) => {
      const value = element("span", { className: "d2f-value" }, "–");
      const dot = element("i", {});
      dot.style.background = stroke;
      return { value, chip: element("span", { className: "d2f-chip" }, dot, `${label} `, value) };
    });
    this.legend.replaceChildren(...this.chips.map(({ chip }) => chip));
    this.data = [[], ...this.view.curves.map(() => [])];
    this.holder.replaceChildren(this.empty);
    this.plot = new uPlot(this.#options(), this.data, this.holder);
    this.plot.over.addEventListener("mouseenter", () => this.plot.syncRect(true));
  }

  #options() {
    const theme = (name, otherwise) => () => getComputedStyle(this.holder).getPropertyValue(name).trim() || otherwise;
    const axis = {
      stroke: theme("--descrip-text", "#999"),
      grid: { stroke: theme("--d2f-grid", "rgba(128, 128, 128, 0.2)"), width: 1 },
      ticks: { show: false },
      font: "11px system-ui, sans-serif",
    };
    return {
      width: this.holder.clientWidth || 360,
      height: HEIGHT,
      padding: [8, 10, 0, 0],
      legend: { show: false },
      scales: { x: { time: false, range: (_, low, high) => [low ?? 0, high > low ? high : (low ?? 0) + 1] }, y: { range: (_, low, high) => this.#range(low, high) } },
      axes: [
        { ...axis, size: 26, gap: 4, space: 60, values: (_, ticks) => ticks.map((tick) => (Number.isInteger(tick) ? String(tick) : "")) },
        { ...axis, size: 58, gap: 4, space: 28, values: (_, ticks) => ticks.map(number) },
      ],
      series: [{}, ...this.view.curves.map((curve) => ({ points: { show: false }, ...curve }))],
      cursor: {
        y: false,
        drag: { x: false, y: false },
        points: { size: 6 },
        // ComfyUI zooms its nodes by a CSS transform, which the mouse's place knows and uPlot does not.
        move: (plot, left, top) => {
          const zoom = plot.over.getBoundingClientRect().width / (plot.over.clientWidth || 1) || 1;
          return [left / zoom, top / zoom];
        },
      },
      hooks: { setCursor: [() => this.#values()] },
    };
  }

  /** Limits in which the curves are seen: single steps far out do not press the rest flat. */
  #range(low, high) {
    const [, raw = [], ...others] = this.data;
    const sorted = raw.filter((value) => value != null).sort((a, b) => a - b);
    if (low == null || !sorted.length) return [0, 1];
    const share = (part) => sorted[Math.round((sorted.length - 1) * part)];
    const rest = others.flat().filter((value) => value != null);
    const bottom = rest.reduce((a, b) => Math.min(a, b), share(0.01));
    const top = rest.reduce((a, b) => Math.max(a, b), share(0.99));
    const margin = (top - bottom || Math.abs(top) || 1) * 0.08;
    return [bottom >= 0 ? Math.max(0, bottom - margin) : bottom - margin, top + margin];
  }

  /** The legend's numbers: under the mouse, else the newest. */
  #values() {
    const at = this.plot?.cursor.idx;
    this.chips.forEach(({ value }, i) => {
      const values = this.data[i + 1] ?? [];
      const newest = values.findLast((one) => one != null);
      setText(value, number(at == null ? newest : values[at]));
    });
  }

  #resize() {
    const width = this.holder.clientWidth;
    if (width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }
}

/** Both tables on the steps of both. */
function joined(trained, validation) {
  return uPlot.join([trained, [validation.steps, validation.loss]]);
}
