// A chat as a tree: a message is {id, parent, role, pieces, reason, stats}; an edit or another try is a sibling.

/** A chat without messages. */
export const emptyTree = () => ({ nodes: [], leaf: null, nextId: 1 });

/** Add a message below another one (null: at the beginning) and return it. */
export function add(tree, parent, role, pieces = []) {
  const node = { id: tree.nextId++, parent, role, pieces, reason: null, stats: null };
  tree.nodes.push(node);
  tree.leaf = node.id;
  return node;
}

/** The message with an id. */
export const find = (tree, id) => tree.nodes.find((node) => node.id === id);

/** The messages from the beginning to one of them. */
export function path(tree, id = tree.leaf) {
  const found = [];
  for (let node = find(tree, id); node; node = find(tree, node.parent)) found.unshift(node);
  return found;
}

/** A message and its siblings, oldest first. */
export const siblings = (tree, node) => tree.nodes.filter((other) => other.parent === node.parent);

/** Go to a message, and from there to the newest answers after it. */
export function select(tree, id) {
  for (let next = id; next != null; next = tree.nodes.findLast((node) => node.parent === next)?.id) tree.leaf = next;
}

/** Take a message out that has nothing after it. */
export function drop(tree, node) {
  tree.nodes = tree.nodes.filter((other) => other !== node);
  if (tree.leaf === node.id) tree.leaf = node.parent;
}
