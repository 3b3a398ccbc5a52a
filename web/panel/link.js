/** Between a panel and the server: what happened before the page was loaded, what happens now, and what was missed. */

import { isBusy } from "./run.js";

const SILENCE = 5000;

/** Brings each entry to the panel once, in its order. */
export class Link {
  /**
   * @param {import("./panel.js").Panel} panel
   * @param {(after: number) => Promise<{entries: Object[], known: boolean}>} history entries after a number
   */
  constructor(panel, history) {
    this.panel = panel;
    this.history = history;
    this.newest = 0;
    this.early = null;
    this.heard = 0;
  }

  /** Shows what the server remembers; entries that come meanwhile wait. */
  async load() {
    if (this.early) return;
    this.early = [];
    let answer = null;
    try {
      answer = await this.history(this.newest);
    } catch {
      // Without a history (another server, or an old one) the panel begins with the next entry.
    }
    const waiting = this.early;
    this.early = null;
    for (const entry of [...(answer?.entries ?? []), ...waiting]) this.hear(entry);
    if (answer?.known === false && this.newest) this.panel.apply({ kind: "lost" });
  }

  /** Takes an entry as it comes. */
  hear(entry) {
    this.heard = performance.now();
    if (this.early) this.early.push(entry);
    else if (entry.seq > this.newest) {
      this.newest = entry.seq;
      this.panel.apply(entry);
    }
  }

  /** To be called now and then: asks the server where a run has been silent for long. */
  async check() {
    if (isBusy(this.panel.run) && performance.now() - this.heard > SILENCE) {
      this.heard = performance.now();
      await this.load();
    }
  }
}
