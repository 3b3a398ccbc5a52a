/** Puts the panels into ComfyUI's nodes. Everything else of the pack works without this file. */

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { onDeciding, rulesOf, showWhatCounts } from "./panel/effects.js";
import { executionId, nodeOf } from "./panel/graph_ids.js";
import { Link } from "./panel/link.js";
import { PairsPanel } from "./panel/pairs_panel.js";
import { onRecipe, showWhatIsUsual } from "./panel/recipe.js";
import { TrainPanel } from "./panel/train_panel.js";

const PANELS = { Diff2FlowTrain: TrainPanel, Diff2FlowReflowPairs: PairsPanel };
const WIDTH = 400, MARGIN = 6, CHECK = 2000;

/** @type {Map<Object, {panel: import("./panel/panel.js").Panel, link: Link}>} by node */
const attached = new Map();

/** @type {Map<string, import("./panel/effects.js").Rules>} of which widgets count when, by class */
const rules = new Map();

// Before the page connects, which may be in mid-run: it warns of messages that nobody listens for.
api.addEventListener("diff2flow.train", ({ detail }) => hear(detail));

app.registerExtension({
  name: "diff2flow.panel",
  setup() {
    api.addEventListener("executing", ({ detail }) => executing(detail));
    api.addEventListener("execution_error", ({ detail }) => fail(detail.node_id, detail.exception_type, detail));
    api.addEventListener("execution_interrupted", ({ detail }) => fail(detail.node_id, "interrupted", detail));
    api.addEventListener("reconnected", loadAll);
    setInterval(() => attached.forEach(({ link }) => link.check()), CHECK);
  },
  beforeRegisterNodeDef(type, definition) {
    const found = definition.name.startsWith("Diff2Flow") && rulesOf(definition);
    if (found) rules.set(definition.name, found);
  },
  nodeCreated(node) {
    const own = rules.get(node.comfyClass);
    if (own) {
      onDeciding(node, own, () => fit(node, own));
      requestAnimationFrame(() => (isVue() ? fit : fitNew)(node, own));
    }
    const Kind = PANELS[node.comfyClass];
    if (Kind) attach(node, Kind);
    onRecipe(node, () => tidy(node));
    requestAnimationFrame(() => tidy(node));
  },
  loadedGraphNode(node) {
    if (rules.has(node.comfyClass)) fitNew(node, rules.get(node.comfyClass));
    tidy(node);
    if (attached.has(node)) grow(node);
  },
  afterConfigureGraph() {
    attached.forEach((_, node) => tidy(node));
    loadAll();
  },
});

/** Shows what the node's recipe asks for, in as much room as that takes. */
function tidy(node) {
  if (!attached.has(node) || !showWhatIsUsual(node)) return;
  node.setSize([Math.max(node.size[0], WIDTH), node.computeSize()[1]]);
  app.canvas?.setDirty(true, true);
}

/** Shows the widgets that count, in as much more or less room as that takes. Nodes 2.0 take what they need at least. */
function fit(node, own) {
  const before = node.computeSize()[1];
  if (!showWhatCounts(node, own)) return;
  const after = node.computeSize()[1];
  resize(node, isVue() ? after : Math.max(after, node.size[1] + after - before));
}

/** The same for a node that was added or loaded: one that is just as high as with all its widgets becomes smaller. */
function fitNew(node, own) {
  const before = node.computeSize()[1];
  if (showWhatCounts(node, own) && Math.abs(node.size[1] - before) < 1) resize(node, node.computeSize()[1]);
}

const isVue = () => Boolean(globalThis.LiteGraph?.vueNodesMode);

function resize(node, height) {
  node.setSize([node.size[0], height]);
  app.canvas?.setDirty(true, true);
}

function attach(node, Kind) {
  const panel = new Kind({
    command: (command) => post(node, command),
    address: (seq) => api.apiURL(`/diff2flow/picture/${idOf(node)}/${seq}${query()}`),
  });
  const height = () => panel.height + 2 * MARGIN;
  const heights = { getMinHeight: height, getMaxHeight: height, getHeight: height };
  const options = { serialize: false, hideOnZoom: false, margin: MARGIN, ...heights };
  const widget = node.addDOMWidget("diff2flow_panel", "diff2flow_panel", panel.root, options);
  widget.serialize = false;
  attached.set(node, { panel, link: new Link(panel, (after) => history(node, after)) });
  const removed = node.onRemoved;
  node.onRemoved = function (...given) {
    attached.delete(node);
    panel.close();
    return removed?.apply(this, given);
  };
  requestAnimationFrame(() => attached.has(node) && grow(node));
}

/** Makes a node large enough for its panel; never smaller. */
function grow(node) {
  const [width, height] = node.computeSize();
  const size = [Math.max(node.size[0], WIDTH, width), Math.max(node.size[1], height)];
  if (size[0] !== node.size[0] || size[1] !== node.size[1]) node.setSize(size);
}

const rootGraph = () => app.rootGraph ?? app.graph;
const idOf = (node) => executionId(rootGraph(), node);
/** The graph's id; "" for one that has none of its own yet. */
const workflow = () => (rootGraph()?.id ?? "").replace(/^[0-]+$/, "");
const query = (after) => `?${new URLSearchParams({ workflow: workflow(), ...(after ? { after } : {}) })}`;

async function history(node, after) {
  const id = idOf(node);
  if (id === undefined) throw new Error("the node is not in the graph");
  const answer = await api.fetchApi(`/diff2flow/history/${id}${query(after)}`);
  if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
  return answer.json();
}

async function post(node, command) {
  const headers = { "Content-Type": "application/json" };
  const options = { method: "POST", headers, body: JSON.stringify({ command }) };
  const answer = await api.fetchApi(`/diff2flow/command/${idOf(node)}${query()}`, options);
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).error ?? `HTTP ${answer.status}`);
}

function loadAll() {
  attached.forEach(({ link }) => link.load());
}

/** An entry of the server: for its node's panel; what another node does, the train nodes wait for. */
function hear(entry) {
  if (!attached.size) return;
  if (entry.workflow && workflow() && entry.workflow !== workflow()) return;
  const own = attached.get(nodeOf(rootGraph(), entry.node));
  if (own) own.link.hear(entry);
  else if (entry.kind === "status") waitingFor({ ...entry, kind: "waiting" });
}

function waitingFor(entry) {
  for (const { panel } of attached.values()) if (panel instanceof TrainPanel) panel.apply(entry);
}

/** Another node runs now; null after the last one. */
function executing(id) {
  tellAll({ kind: "passed" });
  if (id == null) tellAll({ kind: "over" });
  else attached.get(nodeOf(rootGraph(), id))?.panel.apply({ kind: "starting" });
}

function tellAll(entry) {
  attached.forEach(({ panel }) => panel.apply(entry));
}

/** A failure: of a panel's own node, or of one that a panel waits for. */
function fail(id, error, { node_type: type, exception_message: message }) {
  const own = attached.get(nodeOf(rootGraph(), id));
  const hit = own ? [own] : [...attached.values()].filter(({ panel }) => panel.run.state === "waiting");
  const text = (message ?? "").trim();
  hit.forEach(({ panel }) => panel.apply({ kind: "failed", error, message: own ? text : `${type}: ${text}` }));
}
