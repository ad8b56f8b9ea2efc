// What is asked of the server for a turn: a conversation, a text to go on from, or a reply that has begun already.

import * as api from "./api.js";
import { textOf } from "./document.js";
import { parentOf, upTo } from "./tree.js";

const CHAT = "v1/chat/completions";
const TEXT = "v1/completions";

function messages(talk, node, system) {
  const said = upTo(talk, node).filter((m) => m.content).map(({ role, content }) => ({ role, content }));
  return system ? [{ role: "system", content: system }, ...said] : said;
}

// The request that writes into `node`, which may hold the beginning of its reply.
export function request(talk, node, model, { numbers, system }) {
  const body = { model: model.name, ...numbers };
  if (talk.kind === "text") {
    const prompt = textOf(upTo(talk, node));
    return { path: TEXT, body: { ...body, max_tokens: body.max_tokens ?? model.context, prompt, truncate: true } };
  }
  const asked = messages(talk, parentOf(talk, node), system);
  if (!node.content) return { path: CHAT, body: { ...body, messages: asked } };
  return { path: TEXT, body: (signal) => begun(body, asked, node, model, signal) };
}

// A chat model goes on with a reply: the ids of the conversation up to the reply, and those of what it begins with.
async function begun(body, asked, node, model, signal) {
  const tokens = (what) => api.tokenize(model.name, what, signal).then((all) => all.map(({ id }) => id));
  const said = node.tokens?.flatMap((token) => token[3]) ?? [-1];
  const start = said.every((id) => id >= 0) ? said : await tokens({ text: node.content });
  const prompt = [...(await tokens({ messages: asked })), ...start];
  return { ...body, prompt, max_tokens: body.max_tokens ?? model.context };
}
