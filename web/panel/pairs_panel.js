/** The progress view of the pairs node. */

import { duration, speed } from "./format.js";
import { Header, Tiles } from "./header.js";
import { pairsHeadline } from "./headline.js";
import { Panel } from "./panel.js";

const HEIGHT = 92;
const TILES = {
  pairs: ["Pairs", "Pairs made in this run"],
  speed: ["Speed", "The teacher's solver steps a second, each for a whole batch"],
  left: ["Time left", "Until the last pair"],
};

/** Shows how far the pairs are. */
export class PairsPanel extends Panel {
  constructor() {
    super(HEIGHT, "Pairs");
    this.header = new Header();
    this.tiles = new Tiles(TILES);
    this.root.append(this.header.root, this.tiles.root);
    this.redraw();
  }

  /** Draws the run as it is. */
  draw() {
    const { run } = this;
    const text = run.state === "failed" && run.message ? run.message : pairsHeadline(run);
    this.header.show(text, run.done, run.total);
    this.tiles.show({
      pairs: run.total ? `${run.done} / ${run.total}` : "–",
      speed: speed(run.speed),
      left: run.state === "running" ? duration(run.left) : "–",
    });
  }
}
