// Conversations and settings, kept in this browser: each under a key of its own, so that two windows do not undo each
// other. What cannot be kept (storage off or full) lives until the page closes.

import { restored } from "./tree.js";

const PREFIX = "fnlm.";
const TALK = `${PREFIX}talk.`;
const kept = new Map();
const talks = new Map();

function read(key) {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    return null;
  }
}

// Whether the browser keeps it.
function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

function erase(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // storage is off: there was nothing
  }
}

function keys() {
  try {
    return Object.keys(localStorage).filter((key) => key.startsWith(TALK));
  } catch {
    return [];
  }
}

function load(key) {
  const talk = restored(read(key), true);
  if (talk) talks.set(talk.id, talk);
}

keys().forEach(load);
const early = read(`${PREFIX}conversations`); // as the first version of this page kept them
if (Array.isArray(early)) {
  const isMoved = early.map((value) => restored(value, true)).filter(Boolean).every(keep);
  if (isMoved) erase(`${PREFIX}conversations`);
}

// The newest first.
export const conversations = () => [...talks.values()].sort((a, b) => b.changed - a.changed);
export const conversation = (id) => talks.get(id);

// Whether the browser keeps it. Where it is full, the probabilities of old conversations give way first.
export function keep(talk) {
  talks.set(talk.id, talk);
  const key = TALK + talk.id;
  if (write(key, talk)) return true;
  const oldest = conversations().reverse().filter((t) => t.id !== talk.id);
  for (const other of [...oldest, talk]) {
    if (!stripped(other)) continue;
    write(TALK + other.id, other);
    if (write(key, talk)) return true;
  }
  return write(key, talk);
}

function stripped(talk) {
  const nodes = Object.values(talk.nodes).filter((node) => node.tokens);
  for (const node of nodes) delete node.tokens;
  return nodes.length > 0;
}

export function forget(id) {
  talks.delete(id);
  erase(TALK + id);
}

// What another window changed; `changed` hears of each conversation's id.
export function watch(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(TALK)) return;
    const id = key.slice(TALK.length);
    if (newValue === null) talks.delete(id);
    else load(key);
    changed(id);
  });
}

export function recall(name) {
  if (!kept.has(name)) kept.set(name, read(PREFIX + name));
  return kept.get(name);
}

export function remember(name, value) {
  kept.set(name, value);
  return write(PREFIX + name, value);
}

// Chat models and plain ones begin with settings of their own; what is changed is remembered for the model.
const SHARED = { temperature: 0.8, top_k: null, top_p: null, min_p: null, seed: null, think: false };
const DEFAULTS = {
  chat: { ...SHARED, min_tokens: 5, max_tokens: null, system: "" },
  text: { ...SHARED, min_tokens: 10, max_tokens: 200, system: "" },
};

export const settings = (model, kind) => ({ ...DEFAULTS[kind], ...recall(`settings.${kind}.${model}`) });
export const keepSettings = (model, kind, values) => remember(`settings.${kind}.${model}`, values);
