/** What both panels are: a box of fixed height that shows a run, drawn at most once a frame. */

import { element, linkStyle } from "./elements.js";
import { apply, newRun } from "./run.js";

/** Subclasses set `root`'s children and have `draw()`. */
export class Panel {
  /** @param {number} height in pixels, whatever is shown */
  constructor(height, label) {
    linkStyle(new URL("../lib/uPlot-1.6.32.min.css", import.meta.url).href);
    linkStyle(new URL("./panel.css", import.meta.url).href);
    this.height = height;
    this.run = newRun();
    this.root = element("section", { className: "d2f-panel", "aria-label": label });
    // All three: the Vue renderer stretches what is in its boxes, the canvas renderer does not.
    Object.assign(this.root.style, { height: `${height}px`, minHeight: `${height}px`, maxHeight: `${height}px` });
  }

  /** Takes an entry. */
  apply(entry) {
    apply(this.run, entry);
    this.redraw();
  }

  /** Forgets what it knows. */
  reset() {
    this.run = newRun();
    this.redraw();
  }

  /** Draws before the next frame. */
  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.root.dataset.state = this.run.state;
      this.draw();
    });
  }

  /** Lets go of everything. */
  close() {
    if (this.frame) cancelAnimationFrame(this.frame);
  }
}
