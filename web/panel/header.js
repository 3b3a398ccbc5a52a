/** The upper part of a panel: what is going on, how far it is, and numbers. */

import { element, setText } from "./elements.js";

/** A headline with a bar. */
export class Header {
  constructor() {
    this.headline = element("div", { className: "d2f-headline", role: "status", "aria-live": "polite" });
    this.fill = element("div", { className: "d2f-fill" });
    const range = { role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100", "aria-label": "Progress" };
    this.bar = element("div", { className: "d2f-bar", ...range }, this.fill);
    this.root = element("div", { className: "d2f-header" }, this.headline, this.bar);
  }

  /** Shows a headline, and `done` of `total`. */
  show(text, done, total) {
    const percent = total ? Math.min(100, (100 * done) / total) : 0;
    setText(this.headline, text);
    this.headline.title = text;
    this.fill.style.width = `${percent.toFixed(1)}%`;
    this.bar.setAttribute("aria-valuenow", percent.toFixed(0));
  }
}

/** Numbers with their names, in columns of fixed width. */
export class Tiles {
  /** @param {Object<string, [string, string]>} names name and help of each number by its key */
  constructor(names) {
    this.root = element("dl", { className: "d2f-tiles" });
    this.values = {};
    for (const [key, [name, help]] of Object.entries(names)) {
      this.values[key] = element("dd", {}, "–");
      this.root.append(element("div", { title: help }, element("dt", {}, name), this.values[key]));
    }
  }

  /** Shows numbers by their keys. */
  show(numbers) {
    for (const [key, text] of Object.entries(numbers)) setText(this.values[key], text);
  }
}
