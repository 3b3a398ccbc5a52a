/** The panel of the train node. */

import { Chart, VIEWS } from "./chart.js";
import { element, setText } from "./elements.js";
import { duration, number, speed } from "./format.js";
import { Header, Tiles } from "./header.js";
import { trainHeadline, trainNote } from "./headline.js";
import { Panel } from "./panel.js";
import { last } from "./run.js";
import { smoothed, spanOf } from "./smooth.js";
import { Strip } from "./strip.js";

const HEIGHT = 500;
const TILES = {
  loss: ["Loss", "Running mean of the training loss"],
  validation: ["Validation", "Loss on held-out images, at fixed times and noise; needs Diff2Flow Train Watch"],
  rate: ["Learning rate", "Learning rate of this step"],
  norm: ["Gradient", "Length of the gradient before clipping"],
  speed: ["Speed", "Training steps a second"],
  left: ["Time left", "Until the last step"],
};

/** Shows a training run; asks for saving and stopping. */
export class TrainPanel extends Panel {
  /**
   * @param {{command: (name: string) => Promise<void>, address: (seq: number) => string}} server what the buttons
   *   call, and where pictures are
   */
  constructor(server) {
    super(HEIGHT, "Training");
    this.server = server;
    this.header = new Header();
    this.tiles = new Tiles(TILES);
    this.chart = new Chart();
    this.strip = new Strip(server.address);
    this.note = element("div", { className: "d2f-note" });
    this.save = this.#button("save", "Save now", "Writes the LoRA and the state of this step at once; training goes on");
    this.stop = this.#button("stop", "Stop and save", "Ends the training after this step, saves, and lets the workflow go on");
    const foot = element("div", { className: "d2f-foot" }, this.note, this.save, this.stop);
    this.root.append(this.header.root, this.tiles.root, this.#views(), this.chart.root, this.strip.root, foot);
    this.redraw();
  }

  /** Draws the run as it is. */
  draw() {
    const { run } = this;
    const { points } = run;
    const before = run.state === "waiting" || run.state === "starting";
    this.header.show(trainHeadline(run), ...(before ? [run.done, run.total] : [run.step, run.steps]));
    this.tiles.show({
      loss: number(last(smoothed(points.steps, points.loss, spanOf(run.steps)))),
      validation: number(last(run.validation.loss)),
      rate: number(last(points.rate)),
      norm: number(last(points.norm)),
      speed: speed(run.speed),
      left: run.state === "running" ? duration(run.left) : "–",
    });
    this.chart.show(run);
    this.strip.show(run.pictures);
    setText(this.note, trainNote(run));
    this.note.title = this.note.textContent;
    this.save.disabled = run.state !== "running" || run.asked !== "";
    this.stop.disabled = run.state !== "running" || run.asked === "stop";
  }

  close() {
    super.close();
    this.chart.close();
  }

  #views() {
    const tabs = Object.entries(VIEWS).map(([key, { title, help }]) => {
      const tab = element("button", { type: "button", title: help, "aria-pressed": String(key === "loss") }, title);
      tab.addEventListener("click", () => {
        tabs.forEach((other) => other.setAttribute("aria-pressed", String(other === tab)));
        this.chart.look(key);
        this.redraw();
      });
      return tab;
    });
    return element("div", { className: "d2f-tabs", role: "group", "aria-label": "What the chart shows" }, ...tabs);
  }

  #button(command, text, title) {
    const button = element("button", { type: "button", title, disabled: true }, text);
    button.addEventListener("click", async () => {
      this.apply({ kind: "asked", command });
      try {
        await this.server.command(command);
      } catch (error) {
        this.apply({ kind: "asked", command: "" });
        setText(this.note, `${text}: ${error.message}`);
      }
    });
    return button;
  }
}
