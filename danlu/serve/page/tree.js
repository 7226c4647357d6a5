// A conversation is a tree of messages: an edited message and another answer are siblings of the first.
// `nodes` holds them by id; "root" is no message, it only has the first ones as children. Each node shows
// one of its children, so there is always one branch that is read. Answers with the same `pair` were given
// side by side, and are one version together.

export const ROOT = "root";
const MOST_DEEP = 4096;

const newId = () => [...crypto.getRandomValues(new Uint8Array(8))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  const now = Date.now();
  return { version: 1, id: newId(), title: "", system: "", made: now, changed: now, nodes: { [ROOT]: makeNode(ROOT, null, "root", "") } };
}

function makeNode(id, parent, role, content) {
  return { id, parent, role, content, children: [], shown: null };
}

/** Adds a message and shows it. */
export function add(conversation, parent, role, content, more = {}) {
  const node = { ...makeNode(newId(), parent, role, content), ...more };
  conversation.nodes[node.id] = node;
  const above = conversation.nodes[parent];
  above.children.push(node.id);
  above.shown = node.id;
  conversation.changed = Date.now();
  return node;
}

/** Takes a message out that nothing follows. */
export function remove(conversation, id) {
  const node = conversation.nodes[id];
  const above = conversation.nodes[node.parent];
  above.children = above.children.filter((child) => child !== id);
  if (above.shown === id) above.shown = above.children.at(-1) ?? null;
  delete conversation.nodes[id];
}

export const newPair = newId;

/** The messages of the branch that is shown, from the first one; or those down to one message. */
export function branch(conversation, last = null) {
  const found = [];
  if (last !== null) {
    for (let node = conversation.nodes[last]; node.id !== ROOT; node = conversation.nodes[node.parent]) found.unshift(node);
    return found;
  }
  for (let node = conversation.nodes[ROOT]; node.shown !== null; ) {
    node = conversation.nodes[node.shown];
    found.push(node);
  }
  return found;
}

/** What stands beside a message in its place: [[ids that are shown together], …]. */
export function versions(conversation, node) {
  const found = new Map();
  for (const id of conversation.nodes[node.parent].children) {
    const key = conversation.nodes[id].pair ?? id;
    found.set(key, [...(found.get(key) ?? []), id]);
  }
  return [...found.values()];
}

/** The answers that are shown with this one, itself among them. */
export function together(conversation, node) {
  return versions(conversation, node)
    .find((ids) => ids.includes(node.id))
    .map((id) => conversation.nodes[id]);
}

/** Messages as the API takes them, down to one message; answers that hold nothing are left out. */
export function messages(conversation, last = null) {
  const system = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  const said = branch(conversation, last).filter((node) => node.role === "user" || node.content.trim());
  return [...system, ...said.map(({ role, content }) => ({ role, content }))];
}

/** The branch that is shown as one row for fine-tuning; null where the assistant says nothing in it. */
export function trainingRow(conversation) {
  const found = messages(conversation);
  while (found.length && found.at(-1).role !== "assistant") found.pop();
  return found.length ? { messages: found } : null;
}

/** What a conversation is called where nobody named it. */
export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = branch(conversation)[0]?.content.trim().replace(/\s+/g, " ") ?? "";
  return [...first].length > 42 ? [...first].slice(0, 40).join("") + "…" : first;
}

/** Whether something out of a store is a conversation, as whole as the code above takes for granted. */
export function isConversation(value) {
  const isText = (one) => typeof one === "string";
  if (!value || value.version !== 1 || ![value.id, value.title, value.system].every(isText)) return false;
  if (![value.made, value.changed].every(Number.isFinite)) return false;
  const nodes = value.nodes;
  if (!nodes || typeof nodes !== "object" || !Object.hasOwn(nodes, ROOT)) return false;
  for (const [id, node] of Object.entries(nodes)) {
    if (!node || node.id !== id || !isText(node.content) || !Array.isArray(node.children)) return false;
    if (!(id === ROOT ? node.parent === null : ["user", "assistant"].includes(node.role) && isText(node.parent))) return false;
    if (node.model !== undefined && !isText(node.model)) return false;
    if (node.stats !== undefined && !isStats(node.stats)) return false;
    // A child names its parent, so that nothing is the child of two, or of itself.
    if (node.children.some((child) => !Object.hasOwn(nodes, child) || nodes[child].parent !== id)) return false;
    if (new Set(node.children).size !== node.children.length) return false;
    if (node.children.length ? !node.children.includes(node.shown) : node.shown !== null) return false;
    if (id !== ROOT && !nodes[node.parent]?.children?.includes(id)) return false;
  }
  return branch(value).length <= MOST_DEEP;
}

const isStats = (stats) => stats && [stats.tokens, stats.first, stats.seconds].every(Number.isFinite);
