// Replies that are being written: from the server's parts to a turn of the tree, kept as it grows.

import * as api from "./api.js";
import * as store from "./store.js";
import { collector } from "./tokens.js";

const KEEP_EVERY = 1500; // ms
export const NEEDS_KEY = "The server asks for its key.";
const running = new Map(); // by the id of the turn: {talk, stop}

export const isWriting = (node) => running.has(node.id);
export const isBusy = (talk) => [...running.values()].some((r) => r.talk === talk);
export const stop = (talk) => running.forEach((r) => r.talk === talk && r.stop.abort());

// Writes into `node` until the reply ends, breaks off or is stopped; what there is stays. `more` hears that there is some.
export async function write(talk, node, { path, body }, more) {
  const ends = new AbortController();
  running.set(node.id, { talk, stop: ends });
  const state = { began: performance.now(), kept: performance.now(), thoughts: collector(node.tokens) };
  try {
    const { where, what } = await ready(path, body, ends.signal);
    for await (const part of api.reply(where, what, ends.signal)) take(part, talk, node, state, more);
  } catch (error) {
    node.finish = error.name === "AbortError" ? "stopped" : "error";
    if (node.finish === "error") node.error = error.message;
    if (error.status === 401) node.error = NEEDS_KEY;
  }
  node.finish ||= "stop";
  running.delete(node.id);
  return keep(talk);
}

// Whether the browser keeps it; what was deleted meanwhile stays deleted.
const keep = (talk) => !store.conversation(talk.id) || store.keep(talk);

const ready = async (path, body, signal) => ({ where: path, what: typeof body === "function" ? await body(signal) : body });

function take(part, talk, node, state, more) {
  if (part.start) {
    Object.assign(node.meta, { seed: part.start.seed, step: part.start.step });
    if (part.start.dropped) node.meta.dropped = part.start.dropped;
  }
  if (part.tokens) {
    state.thoughts.take(part.tokens);
    node.tokens = state.thoughts.tokens;
  }
  if (part.text) {
    node.content += part.text;
    more();
  }
  if (part.finish) node.finish = part.finish;
  if (part.usage) {
    node.meta.tokens = part.usage.completion_tokens;
    node.meta.seconds = (performance.now() - state.began) / 1000;
  }
  if (performance.now() - state.kept < KEEP_EVERY) return;
  state.kept = performance.now();
  keep(talk);
}

addEventListener("pagehide", () => running.forEach(({ talk }) => keep(talk)));
