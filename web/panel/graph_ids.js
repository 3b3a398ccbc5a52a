/** Ids of nodes as the server knows them: "3", or "5:3" for node 3 inside subgraph node 5. */

/** The id of a node, undefined where it is in none of the graphs below `root`. */
export function executionId(root, node) {
  if (!root) return undefined;
  for (const one of nodesOf(root)) {
    if (one === node) return String(one.id);
    const inner = one.subgraph && executionId(one.subgraph, node);
    if (inner !== undefined && inner) return `${one.id}:${inner}`;
  }
  return undefined;
}

/** The node with that id, undefined where there is none. */
export function nodeOf(root, id) {
  const [first, ...rest] = String(id).split(":");
  const node = nodesOf(root).find((one) => String(one.id) === first);
  return rest.length && node?.subgraph ? nodeOf(node.subgraph, rest.join(":")) : rest.length ? undefined : node;
}

const nodesOf = (graph) => graph?.nodes ?? graph?._nodes ?? [];
