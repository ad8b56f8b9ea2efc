// The page: which model, which conversation, and one reply at a time.

import * as api from "./api.js";
import { askKey, closeDrawers, frame, grow } from "./frame.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import * as view from "./view.js";

const byId = (id) => document.getElementById(id);
const EXAMPLES = {
  chat: [
    "Lily is in the park with a red kite. The kite of Lily is red. What colour is the kite?",
    "Tell me a story.",
    "Which number comes after two?",
    "What can you do?",
  ],
  text: ["Once upon a time", "Tom is in the kitchen. Tom found a red", "ROMEO:", "The little girl went to the park and saw"],
};

let models = [];
let model = null; // of the models, the one chosen
let talk = null; // the conversation shown
let stopper = null; // ends the reply that is being written

// Models

async function refreshModels() {
  try {
    models = await api.models();
  } catch (error) {
    if (error.status !== 401) return notify(error.message);
    await askKey();
    return refreshModels();
  }
  notify(models.length ? "" : "There is no model in the served folders yet.");
  const options = models.map((m) => {
    const option = view.make("option", "", `${m.name} (${m.chat ? "chat" : "text"})`);
    option.value = m.name;
    return option;
  });
  byId("model").replaceChildren(...options);
  const wanted = model?.name ?? store.recall("model");
  choose(models.find((m) => m.name === wanted) ?? models[0] ?? null);
  return null;
}

const si = (n) => {
  const [value, unit] = n >= 1e9 ? [n / 1e9, " G"] : n >= 1e6 ? [n / 1e6, " M"] : n >= 1e3 ? [n / 1e3, " k"] : [n, ""];
  return (value < 100 ? Number(value.toPrecision(3)) : Math.round(value)) + unit;
};
const kind = () => (model && !model.chat ? "text" : "chat");

function choose(next) {
  model = next;
  byId("about").textContent = model
    ? [`${si(model.parameters)} parameters`, `step ${model.step.toLocaleString("en")}`,
      model.loss === null ? "" : `loss ${model.loss.toFixed(2)}`].filter(Boolean).join(" · ")
    : "no model yet";
  byId("about").title = model ? `context of ${model.context.toLocaleString("en")} tokens` : "";
  if (!model) return;
  byId("model").value = model.name;
  store.remember("model", model.name);
  settings.use(kind());
  if (!talk || (talk.kind !== kind() && talk.messages.length)) open(store.begin(model.name, kind()));
  else {
    Object.assign(talk, { model: model.name, kind: kind() });
    dress();
  }
}

// Conversations

function open(next) {
  stopper?.abort();
  talk = next;
  const theirs = models.find((m) => m.name === talk.model) ?? models.find((m) => (m.chat ? "chat" : "text") === talk.kind);
  if (theirs && theirs !== model) choose(theirs);
  view.show(talk, toolsOf);
  dress();
  closeDrawers();
}

// Everything that depends on the kind of model and on whether anything was said.
function dress() {
  const chat = kind() === "chat";
  byId("hello").hidden = talk.messages.length > 0;
  byId("hello-title").textContent = model?.name ?? "fnlm";
  byId("hello-text").textContent = chat
    ? "Ask it something, or begin with one of these."
    : "This model continues text. Write how it begins, or take one of these.";
  byId("examples").replaceChildren(...EXAMPLES[kind()].map((text) => view.button(text, () => send(text), "")));
  byId("text").placeholder = chat ? "Say something" : "Begin a text";
  byId("text-label").textContent = chat ? "Message" : "Beginning of a text";
  byId("send").textContent = chat ? "Send" : "Write";
  view.showList(store.conversations(), talk.id, open, remove);
}

function remove(gone) {
  store.forget(gone.id);
  if (gone.id === talk.id) open(store.begin(model?.name, kind()));
  else dress();
}

// Above the hint, until there is nothing more to say.
function notify(line) {
  byId("notice").textContent = line;
  byId("notice").hidden = !line;
}

// Replies

function toolsOf(index) {
  const last = index === talk.messages.length - 1;
  const copied = talk.kind === "text" ? () => wholeText(index) : () => talk.messages[index].content;
  const copy = view.button("Copy", () => copyText(copied(), copy));
  const tools = [copy];
  if (last) tools.push(view.button("Regenerate", () => regenerate(), "quiet last"));
  if (last && talk.kind === "text") tools.push(view.button("Go on", () => goOn(), "quiet last"));
  return tools;
}

const wholeText = (index) => (talk.messages[index - 1]?.content ?? "") + talk.messages[index].content;

async function copyText(text, label) {
  try {
    await navigator.clipboard.writeText(text);
    label.textContent = "Copied";
  } catch {
    label.textContent = "Not allowed";
  }
  setTimeout(() => { label.textContent = "Copy"; }, 1500);
}

function send(text) {
  if (stopper || !model || !text.trim()) return;
  talk.messages.push({ role: "user", content: text });
  store.keep(talk);
  byId("hello").hidden = true;
  view.clearTools();
  view.addPrompt(text, talk.kind);
  byId("text").value = "";
  grow();
  write();
}

function regenerate() {
  if (stopper || talk.messages.at(-1)?.role !== "assistant") return;
  talk.messages.pop();
  view.dropLast(talk.kind);
  write();
}

// A plain model reads on from the end of what it wrote.
function goOn() {
  if (stopper) return;
  talk.messages.push({ role: "user", content: wholeText(talk.messages.length - 1) });
  talk.messages.splice(-3, 2);
  view.show(talk, toolsOf);
  write();
}

function request(asked) {
  const said = talk.messages.filter((m) => m.content).map(({ role, content }) => ({ role, content }));
  const body = { model: model.name, ...asked.numbers };
  if (talk.kind === "text") return { ...body, max_tokens: body.max_tokens ?? model.context, prompt: said.at(-1).content, truncate: true };
  return { ...body, messages: asked.system ? [{ role: "system", content: asked.system }, ...said] : said };
}

async function write() {
  const asked = settings.chosen();
  const mine = talk;
  const turn = view.addReply(mine.kind);
  const message = { role: "assistant", content: "", finish: "", meta: {} };
  if (!asked) return finish(mine, turn, { ...message, error: "One of the settings is not valid." });
  const stop = new AbortController();
  busy(stop);
  try {
    for await (const part of api.reply(mine.kind, request(asked), stop.signal)) take(part, message, turn);
  } catch (error) {
    message.finish = error.name === "AbortError" ? "stopped" : "error";
    if (message.finish === "error") message.error = error.message;
    if (error.status === 401) await askKey();
  }
  busy(null);
  return finish(mine, turn, message);
}

function take(part, message, turn) {
  if (part.start) {
    message.meta = { seed: part.start.seed, step: part.start.step };
    message.began = performance.now();
    if (part.start.dropped) turn.note(outgrown(part.start.dropped));
  }
  if (part.text) {
    message.content += part.text;
    turn.add(part.text);
  }
  if (part.finish) message.finish = part.finish;
  if (part.usage) {
    message.meta.tokens = part.usage.completion_tokens;
    message.meta.seconds = (performance.now() - message.began) / 1000;
  }
}

function outgrown(n) {
  if (talk.kind === "text") return `The text outgrew what the model can read: its first ${n} tokens were left out.`;
  const what = n === 1 ? "message was" : `${n} messages were`;
  return `The conversation outgrew what the model can read: its oldest ${what} left out.`;
}

function finish(mine, turn, message) {
  const { role, content, finish: end, meta } = message; // an error is said once, not kept
  mine.messages.push({ role, content, finish: end, meta });
  const isKept = store.keep(mine);
  if (mine !== talk) return;
  turn.finish(message, toolsOf(mine.messages.length - 1));
  notify(isKept ? "" : "This browser keeps no more conversations; clear some.");
  byId("said").textContent = message.error ?? message.content;
  dress();
}

function busy(next) {
  stopper = next;
  byId("send").hidden = Boolean(next);
  byId("stop").hidden = !next;
  byId("model").disabled = Boolean(next);
  if (next) byId("said").textContent = "Writing";
}

// The page's own events

frame();
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(byId("text").value);
});
byId("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send(byId("text").value);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") stopper?.abort();
});
byId("stop").addEventListener("click", () => {
  stopper?.abort();
  byId("text").focus();
});
byId("new").addEventListener("click", () => {
  open(store.begin(model?.name, kind()));
  byId("text").focus();
});
byId("clear").addEventListener("click", () => {
  if (!confirm("Delete all conversations kept in this browser?")) return;
  store.forgetAll();
  open(store.begin(model?.name, kind()));
});
byId("model").addEventListener("change", () => choose(models.find((m) => m.name === byId("model").value)));
addEventListener("focus", () => stopper || refreshModels());

open(store.begin(null, "chat"));
refreshModels().then(() => byId("text").focus());
