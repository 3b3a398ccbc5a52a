/** The latest samples, side by side, the newest at the right. */

import { element } from "./elements.js";

/** A strip that can be scrolled by wheel, touch and keyboard; it follows the newest unless it was scrolled back. */
export class Strip {
  /** @param {(seq: number) => string} address of a picture by its number */
  constructor(address) {
    this.address = address;
    this.empty = element("div", { className: "d2f-empty" }, "No samples yet. Connect Diff2Flow Train Watch to see some.");
    this.list = element("div", {
      className: "d2f-strip", tabIndex: 0, role: "list", title: "Samples, the newest at the right; click one to see it large",
      "aria-label": "Samples", "data-capture-wheel": "true",
    });
    this.root = element("div", { className: "d2f-strip-frame" }, this.list, this.empty);
    this.list.addEventListener("wheel", (event) => this.#wheel(event), { passive: false });
    this.shown = new Map();
  }

  /** Shows these pictures ({step, seq, width, height}). */
  show(pictures) {
    const atEnd = this.list.scrollLeft + this.list.clientWidth >= this.list.scrollWidth - 8;
    const wanted = new Set(pictures.map(({ seq }) => seq));
    const added = pictures.filter(({ seq }) => !this.shown.has(seq));
    const removed = [...this.shown.keys()].filter((seq) => !wanted.has(seq));
    if (!added.length && !removed.length) return;
    for (const seq of removed) {
      this.shown.get(seq).remove();
      this.shown.delete(seq);
    }
    for (const picture of added) this.#add(picture);
    this.empty.hidden = this.shown.size > 0;
    if (atEnd) this.list.scrollLeft = this.list.scrollWidth;
  }

  #add({ step, seq, width, height }) {
    const image = element("img", { src: this.address(seq), alt: `Sample at step ${step}`, draggable: false });
    if (width && height) image.style.aspectRatio = `${width} / ${height}`; // its place is known before it is loaded
    const properties = { href: this.address(seq), target: "_blank", rel: "noopener", className: "d2f-sample", role: "listitem" };
    const made = element("a", { ...properties, title: `Step ${step}: open large` }, image, element("span", {}, `step ${step}`));
    this.shown.set(seq, made);
    this.list.append(made);
  }

  #wheel(event) {
    if (this.list.scrollWidth <= this.list.clientWidth || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    this.list.scrollLeft += event.deltaY || event.deltaX;
  }
}
