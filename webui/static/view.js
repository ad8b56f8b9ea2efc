// The conversation on the page, and the reader's place in it.

import { documentOf } from "./document.js";
import { close } from "./tokens.js";
import { branch, path } from "./tree.js";
import { pairOf, turnOf } from "./turn.js";
import { byId } from "./ui.js";

const scroll = byId("scroll");
const log = byId("log");
const down = byId("down");
const NEAR = 48; // pixels from the end that still count as being there

let isFollowing = true; // the reader is at the end, and stays there
let parts = new Map(); // what is on the page, by the id of its turn

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;

export function toEnd() {
  isFollowing = true;
  scroll.scrollTop = scroll.scrollHeight;
  down.hidden = true;
}

// After the page grew or changed its size: stay at the end only where the reader was there.
function follow() {
  if (isFollowing) toEnd();
  else down.hidden = atEnd();
}

let lastTop = 0;
scroll.addEventListener("scroll", () => {
  const isUp = scroll.scrollTop < lastTop;
  lastTop = scroll.scrollTop;
  if (atEnd()) isFollowing = true;
  else if (isUp) isFollowing = false;
  down.hidden = isFollowing;
}, { passive: true });
down.addEventListener("click", toEnd);
new ResizeObserver(follow).observe(log);
new ResizeObserver(follow).observe(scroll);

// All turns anew; `at` keeps the reader's place rather than going to the end.
export function show(talk, actions, at = "end") {
  close();
  const top = scroll.scrollTop;
  parts = new Map();
  const shown = path(talk);
  if (talk.kind === "text") log.replaceChildren(...text(talk, shown, actions));
  else log.replaceChildren(...shown.map((node) => elementOf(talk, node, shown, actions)));
  if (at === "end") toEnd();
  else scroll.scrollTop = top;
}

// Two replies that were asked for together, while nothing follows them.
function pair(talk, node, shown) {
  if (!node?.meta.pair || node !== shown.at(-1)) return null;
  const nodes = talk.nodes[node.parent].children.map((id) => talk.nodes[id]).filter((n) => n.meta.pair === node.meta.pair);
  return nodes.length === 2 ? nodes.reverse() : null; // the chosen model's was added last
}

function text(talk, shown, actions) {
  const both = pair(talk, shown.at(-1), shown);
  const one = both ? shown.slice(0, -1) : shown;
  const elements = one.length ? [documentOf(talk, one, actions, parts)] : [];
  return both ? [...elements, pairOf(talk, both, actions, parts)] : elements;
}

function elementOf(talk, node, shown, actions) {
  const both = pair(talk, node, shown);
  if (both) return pairOf(talk, both, actions, parts);
  const part = turnOf(talk, node, { ...actions, several: shown.some((n) => n.model && n.model !== talk.model) });
  parts.set(node.id, part);
  return part.element;
}

// More of a reply that is being written; nothing where it is not shown.
export function more(node) {
  parts.get(node.id)?.add(follow);
}

// A reply that ended: its tools, and Markdown where it has some.
export function ended(talk, node, actions) {
  if (!parts.has(node.id)) return;
  if (talk.kind === "text" || node.meta.pair) show(talk, actions, isFollowing ? "end" : "keep");
  else {
    const { element } = parts.get(node.id);
    const next = elementOf(talk, node, path(talk), actions);
    element.replaceWith(next);
    follow();
  }
}

// The turn that the arrow keys move between branches of: the last on the page that has some.
export const branching = (talk) => path(talk).findLast((node) => branch(talk, node).count > 1);
