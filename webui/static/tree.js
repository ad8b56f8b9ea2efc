// A conversation is a tree of turns: editing and regenerating add a branch, and nothing said is lost.
// {id, title, named, model, kind, changed, nodes}; a node has {id, parent, children, at, role, content, ...};
// `at` is which of its children is shown. The root says nothing.

const ROOT = "root";
const MOST = 5000; // turns of one conversation that is read from a file
const fresh = () => `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;

export function begin(model, kind) {
  const nodes = { [ROOT]: { id: ROOT, parent: null, children: [], at: 0 } };
  return { id: fresh(), title: "", named: false, model, kind, changed: Date.now(), nodes };
}

// The turns that are shown, from the first to the last.
export function path(talk) {
  const shown = [];
  for (let node = down(talk, talk.nodes[ROOT]); node; node = down(talk, node)) shown.push(node);
  return shown;
}

const down = (talk, node) => talk.nodes[node.children[node.at]];
export const last = (talk) => path(talk).at(-1) ?? talk.nodes[ROOT];
export const root = (talk) => talk.nodes[ROOT];
export const parentOf = (talk, node) => talk.nodes[node.parent];
export const isEmpty = (talk) => root(talk).children.length === 0;

// The turns from the first to this one.
export function upTo(talk, node) {
  const found = [];
  for (let n = node; n && n.id !== ROOT; n = talk.nodes[n.parent]) found.unshift(n);
  return found;
}

// A new turn below `parent`, shown from now on.
export function add(talk, parent, said) {
  const node = { finish: "", meta: {}, ...said, id: fresh(), parent: parent.id, children: [], at: 0 };
  talk.nodes[node.id] = node;
  parent.at = parent.children.push(node.id) - 1;
  talk.changed = Date.now();
  if (!talk.title && node.content) talk.title = titled(node.content);
  return node;
}

export const titled = (text) => text.trim().replace(/\s+/g, " ").slice(0, 60);

// Takes a turn away, with all that follows it.
export function drop(talk, node) {
  const parent = parentOf(talk, node);
  parent.children = parent.children.filter((id) => id !== node.id);
  parent.at = Math.max(0, Math.min(parent.at, parent.children.length - 1));
  for (const id of node.children) if (talk.nodes[id]) drop(talk, talk.nodes[id]);
  delete talk.nodes[node.id];
}

// Which of its parent's children a turn is: {index, count}.
export function branch(talk, node) {
  const { children } = parentOf(talk, node);
  return { index: children.indexOf(node.id), count: children.length };
}

// Shows the branch that is `by` further than this turn's.
export function turnTo(talk, node, by) {
  const parent = parentOf(talk, node);
  const to = branch(talk, node).index + by;
  if (to < 0 || to >= parent.children.length) return false;
  parent.at = to;
  return true;
}

export const choose = (talk, node) => {
  const parent = parentOf(talk, node);
  parent.at = parent.children.indexOf(node.id);
};

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const string = (value, most) => (typeof value === "string" ? value.slice(0, most) : "");

// A conversation out of what a file or the browser kept; null where it is none. Only known fields are taken, and ids
// are made anew unless `keepId`.
export function restored(value, keepId = false) {
  if (!isObject(value)) return null;
  const talk = begin(string(value.model, 500) || null, value.kind === "text" ? "text" : "chat");
  if (keepId && typeof value.id === "string") talk.id = value.id;
  if (Array.isArray(value.messages)) fromMessages(talk, value.messages);
  else if (isObject(value.nodes) && Object.hasOwn(value.nodes, ROOT)) fromNodes(talk, value.nodes);
  else return null;
  talk.title = string(value.title, 200) || talk.title;
  talk.named = value.named === true;
  talk.changed = Number.isFinite(value.changed) ? value.changed : Date.now();
  return talk;
}

function fromMessages(talk, messages) {
  let node = root(talk);
  for (const message of messages.slice(0, MOST)) if (isTurn(message)) node = add(talk, node, said({ finish: "stop", ...message }));
}

function fromNodes(talk, nodes) {
  const todo = [[ROOT, root(talk)]];
  const seen = new Set([ROOT]);
  while (todo.length && seen.size < MOST) {
    const [id, copy] = todo.pop();
    const { children, at } = nodes[id];
    for (const child of Array.isArray(children) ? children : []) {
      if (seen.has(child) || !Object.hasOwn(nodes, child) || !isTurn(nodes[child])) continue;
      seen.add(child);
      todo.push([child, add(talk, copy, said(nodes[child]))]);
    }
    copy.at = Number.isInteger(at) && at >= 0 && at < copy.children.length ? at : 0;
  }
}

const isTurn = (m) => isObject(m) && ["user", "assistant"].includes(m.role) && typeof m.content === "string";

function said({ role, content, finish, meta, tokens, model }) {
  const kept = { role, content, finish: string(finish, 20) };
  if (role === "assistant") kept.finish ||= "stopped"; // it was being written when the page closed
  if (typeof model === "string") kept.model = model.slice(0, 500);
  kept.meta = Object.fromEntries(Object.entries(isObject(meta) ? meta : {}).filter(([, v]) => Number.isFinite(v) || v === true));
  if (Array.isArray(tokens) && tokens.every(isToken)) kept.tokens = tokens;
  return kept;
}

const isPair = (p) => Array.isArray(p) && typeof p[0] === "string" && typeof p[1] === "number";
const isToken = (t) => isPair(t) && Array.isArray(t[2]) && t[2].every(isPair) && Array.isArray(t[3]) && t[3].every(Number.isInteger);
