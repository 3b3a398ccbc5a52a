/** What a run does now, in one line. */

const PHASES = { saving: "saving", validating: "validating", sampling: "drawing samples" };
const ASKED = { save: "saves after this step", stop: "stops and saves after this step" };

/** For the train node. */
export function trainHeadline(run) {
  const at = `Step ${run.step} of ${run.steps}`;
  switch (run.state) {
    case "waiting": return run.text || "Waiting for another node";
    case "starting": return run.text || "Getting the model ready";
    case "running": return [at, PHASES[run.phase] ?? ASKED[run.asked]].filter(Boolean).join(" · ");
    case "ending": return `${at} · saving`;
    case "done": return run.step < run.steps ? `Stopped after step ${run.step} of ${run.steps}` : `Finished: ${run.steps} steps`;
    case "cancelled": return run.steps ? `Cancelled after step ${run.step} of ${run.steps}` : "Cancelled";
    case "failed": return "Stopped by an error";
    default: return "Not trained yet";
  }
}

/** For the pairs node. */
export function pairsHeadline(run) {
  switch (run.state) {
    case "waiting":
    case "starting": return run.text || "Getting the teacher ready";
    case "running": return "Making pairs";
    case "done": return run.total ? "All pairs are made" : "Ready";
    case "cancelled": return "Cancelled; finished pairs are kept";
    case "failed": return "Stopped by an error; finished pairs are kept";
    default: return "No pairs made yet";
  }
}

/** The line below: what was saved, what went wrong, why a run was not continued, or what to do first. */
export function trainNote(run) {
  if (run.state === "failed") return run.message || "See ComfyUI's log.";
  if (run.state === "done" && run.step < run.steps) return `Saved as ${run.saved}. Run again goes on from here.`;
  if (run.saved) return [`Saved as ${run.saved}`, run.note].filter(Boolean).join("; ");
  if (run.note) return run.note;
  if (run.state === "idle") return "Press Run: loss, samples and progress are shown here.";
  return run.name ? `Trains ${run.name}` : "";
}
