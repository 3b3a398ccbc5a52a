/** What is known of a node's run, and how each entry from the server changes it. No page, no server. */

const MOST_POINTS = 2400;
const MOST_PICTURES = 24;
const BUSY = new Set(["waiting", "starting", "running", "ending"]);

/**
 * A run before anything was heard of it.
 * state: "idle", "waiting" (for another node), "starting", "running", "ending", "done", "cancelled" or "failed".
 */
export function newRun() {
  return {
    state: "idle", before: "idle", name: undefined, phase: "", text: "", step: 0, steps: 0, asked: "", message: "", saved: "", note: "",
    points: emptyPoints(), seen: 0, every: 1, validation: { steps: [], loss: [] }, pictures: [],
    speed: null, left: null, done: 0, total: 0,
  };
}

/** Whether something is going on. */
export const isBusy = (run) => BUSY.has(run.state);

/** Changes the run by an entry; entries of unknown kinds change nothing. */
export function apply(run, entry) {
  KINDS[entry.kind]?.(run, entry);
}

/** The newest value of a curve, null where there is none. */
export const last = (values) => (values.length ? values[values.length - 1] : null);

/** "Encoding digits · 12 of 100", or what is said before there is something to count. */
const counted = (title, text, done, total) => (done && total ? `${title} · ${done} of ${total}` : text || title || "");

const emptyPoints = () => ({ steps: [], loss: [], rate: [], norm: [] });

const KINDS = {
  waiting(run, { title, text, done, total }) {
    if (run.state === "running" || run.state === "ending") return;
    if (run.state !== "waiting") run.before = run.state;
    Object.assign(run, { state: "waiting", text: counted(title, text, done, total), done, total });
  },
  starting(run) {
    if (run.state === "running" || run.state === "ending") return; // said again to a page that was loaded in mid-run
    Object.assign(run, { state: "starting", text: "", message: "", saved: "", asked: "" });
  },
  status(run, { title, text, done, total }) {
    Object.assign(run, { state: "starting", text: counted(title, text, done, total), done, total });
  },
  begin(run, { name, step, steps }) {
    if (!step || (run.name !== undefined && run.name !== name)) Object.assign(run, newRun());
    else forgetAfter(run, step);
    Object.assign(run, { state: "running", name, step, steps, phase: "", text: "", message: "", saved: "", asked: "", note: "" });
  },
  note(run, { text }) {
    run.note = text;
  },
  earlier(run, { steps, losses }) {
    const first = run.points.steps[0] ?? Infinity;
    const count = steps.filter((step) => step < first).length;
    const blank = new Array(count).fill(null);
    const before = { steps: steps.slice(0, count), loss: losses.slice(0, count), rate: blank, norm: blank };
    for (const key of Object.keys(run.points)) run.points[key] = [...before[key], ...run.points[key]];
  },
  step(run, { step, loss, learning_rate, grad_norm, steps_per_second, seconds_left }) {
    const { points } = run;
    if (step <= (last(points.steps) ?? 0)) return;
    keep(run, { steps: step, loss, rate: learning_rate, norm: grad_norm });
    Object.assign(run, { state: "running", step, speed: steps_per_second, left: seconds_left, phase: "" });
  },
  validation(run, { step, loss }) {
    run.validation.steps.push(step);
    run.validation.loss.push(loss);
    run.phase = "";
  },
  picture(run, { step, seq, width, height }) {
    run.pictures = [...run.pictures, { step, seq, width, height }].slice(-MOST_PICTURES);
    run.phase = "";
  },
  phase(run, { phase, step }) {
    Object.assign(run, { phase, step: step ?? run.step });
  },
  state(run) {
    run.phase = "";
  },
  asked(run, { command }) {
    run.asked = command;
  },
  end(run, { step }) {
    Object.assign(run, { state: "ending", step, phase: "saving", left: 0 });
  },
  saved(run, { name, step }) {
    const over = run.state === "ending";
    Object.assign(run, { saved: name, step, phase: "", asked: run.asked === "save" ? "" : run.asked });
    if (over) run.state = "done";
  },
  failed(run, { error, message }) {
    const cancelled = /interrupt/i.test(error ?? "");
    Object.assign(run, { state: cancelled ? "cancelled" : "failed", message: cancelled ? "" : message, phase: "", asked: "" });
  },
  over(run) {
    if (run.state === "waiting") run.state = run.before;
    if (run.state === "starting") run.state = "idle";
  },
  passed(run) {
    if (run.state === "starting") run.state = "done";
  },
  lost(run) {
    const message = "The server no longer runs this node. Queue again: it goes on from its last saved state.";
    if (isBusy(run)) Object.assign(run, { state: "failed", message, asked: "" });
  },
  pairs(run, { done, total, steps_per_second, seconds_left }) {
    const state = done >= total ? "done" : "running";
    Object.assign(run, { state, done, total, speed: steps_per_second, left: seconds_left, text: "", message: "" });
  },
};

/** Adds a point; of very many only every second, fourth, ... stays, evenly over the run, and always the newest. */
function keep(run, point) {
  const { points } = run;
  const replaces = run.seen % run.every !== 1 % run.every;
  for (const key of Object.keys(points)) {
    if (replaces) points[key].pop();
    points[key].push(point[key]);
  }
  run.seen += 1;
  if (points.steps.length <= MOST_POINTS) return;
  for (const key of Object.keys(points)) points[key] = points[key].filter((_, i) => i % 2 === 0);
  run.every *= 2;
}

function forgetAfter(run, step) {
  const count = run.points.steps.filter((known) => known <= step).length;
  for (const key of Object.keys(run.points)) run.points[key] = run.points[key].slice(0, count);
  const tests = run.validation.steps.filter((known) => known <= step).length;
  run.validation = { steps: run.validation.steps.slice(0, tests), loss: run.validation.loss.slice(0, tests) };
  run.pictures = run.pictures.filter((picture) => picture.step <= step);
}
