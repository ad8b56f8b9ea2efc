// The server: its models, replies as they are written, tokens and Markdown.

import { recall, remember } from "./store.js";

export class Refused extends Error {
  constructor(status, message, param) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

// A key in the address (#key=...) was put there by `fnlm serve --open`; it never reaches the server's log.
const given = new URLSearchParams(location.hash.slice(1)).get("key");
if (given) {
  remember("key", given);
  history.replaceState(null, "", location.pathname + location.search);
}

function headers() {
  const key = recall("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function asked(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is fnlm serve still running?");
  }
  if (response.ok) return response;
  const { error } = (await response.json().catch(() => null)) ?? {};
  throw new Refused(response.status, error?.message ?? `The server answered ${response.status}.`, error?.param);
}

const posted = (path, body, signal) =>
  asked(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

export async function models() {
  const body = await (await asked("v1/models")).json();
  return body.data.map((m) => ({ ...m.fnlm, name: m.id, chat: m.fnlm.chat ?? m.fnlm.kind === "chat" }));
}

// The runs that have a page, by name.
export async function runs() {
  return (await (await asked("v1/runs")).json()).data.map(({ id }) => id);
}

const query = (values) => new URLSearchParams(values);

// A run as it is now; without its charts where those of the version `seen` still hold.
export async function run(name, seen) {
  return (await asked(`v1/run?${query({ name, seen })}`)).json();
}

export async function sample(name, at) {
  return (await (await asked(`v1/run/sample?${query({ name, at })}`)).json()).text;
}

// The tokens of a text, or of a conversation ({messages}): [{id, text, special}].
export async function tokenize(model, what, signal) {
  return (await (await posted("v1/tokenize", { model, ...what }, signal)).json()).tokens;
}

export async function markdown(texts) {
  return (await (await posted("v1/markdown", { texts })).json()).html;
}

let hasProbabilities = true; // until the server says that it has none

// Yields {text}, {tokens}, {start: {dropped, seed, step}}, {finish} and {usage}; throws Refused, or AbortError when stopped.
export async function* reply(path, body, signal) {
  const whole = { ...body, stream: true, stream_options: { include_usage: true } };
  const asking = path.includes("chat") ? { logprobs: true, top_logprobs: 5 } : { logprobs: 5 };
  const wanted = hasProbabilities ? asking : {};
  let response;
  try {
    response = await posted(path, { ...whole, ...wanted }, signal);
  } catch (error) {
    if (!wanted.logprobs || error.status !== 400 || !/logprobs/.test(error.param ?? "")) throw error;
    hasProbabilities = false;
    response = await posted(path, whole, signal);
  }
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    yield* parts(JSON.parse(data));
  }
  throw new Refused(0, "The connection broke before the reply was finished.");
}

function* parts(chunk) {
  if (chunk.error) throw new Refused(500, chunk.error.message);
  if (chunk.usage) yield { usage: chunk.usage };
  else if (chunk.fnlm) yield { start: chunk.fnlm };
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content ?? choice?.text;
  const tokens = choice?.logprobs ? scored(choice.logprobs) : [];
  if (tokens.length) yield { tokens };
  if (text) yield { text };
  if (choice?.finish_reason) yield { finish: choice.finish_reason };
}

// Tokens of a chat reply or of a completion, as {bytes, logprob, id, top: [{bytes, logprob, id}]}.
function scored({ content, tokens, token_logprobs: logprobs, top_logprobs: top, ids }) {
  if (content) return content.map((token) => ({ ...token, top: token.top_logprobs ?? [] }));
  return (tokens ?? []).map((token, i) => ({
    bytes: spelled(token),
    logprob: logprobs[i],
    id: ids?.[i],
    top: Object.entries(top?.[i] ?? {}).map(([other, logprob]) => ({ bytes: spelled(other), logprob })),
  }));
}

// A part of a character is spelled as its bytes: \xe2\x80.
function spelled(token) {
  if (/^(\\x[0-9a-f]{2})+$/.test(token)) return token.match(/[0-9a-f]{2}/g).map((byte) => parseInt(byte, 16));
  return [...new TextEncoder().encode(token)];
}

// The data of server-sent events; comments are heartbeats.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) if (block.startsWith("data: ")) yield block.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
