// The page: which models there are, which conversation is shown, and what is done with it.

import * as catalog from "./catalog.js";
import { counter, recount } from "./counter.js";
import { examples } from "./examples.js";
import { askKey, closeDrawers, frame, grow, showSettings, slideIn } from "./frame.js";
import { keys } from "./keys.js";
import { facts, pick } from "./picker.js";
import { request } from "./requests.js";
import * as settings from "./settings.js";
import * as store from "./store.js";
import { draw, mark, talks } from "./talks.js";
import * as tree from "./tree.js";
import { edit } from "./turn.js";
import { button, byId, toast } from "./ui.js";
import * as view from "./view.js";
import { NEEDS_KEY, isBusy, isWriting, stop, write } from "./writing.js";

let model = null; // the one chosen
let rival = null; // another that answers beside it
let talk = tree.begin(null, "chat"); // the conversation shown

const kind = () => (model && !model.chat ? "text" : "chat");
const box = byId("text");

// Models

let isFirst = true; // the address may name a model, and another to compare it with
let refreshing = null; // one at a time: each may ask for the key

function refreshModels() {
  refreshing ??= fetchModels().finally(() => { refreshing = null; });
  return refreshing;
}

async function fetchModels() {
  try {
    await catalog.refresh();
  } catch (error) {
    if (error.status !== 401) return notify(error.message);
    await askKey();
    return fetchModels();
  }
  notify(catalog.all().length ? "" : "There is no model in the served folders yet.");
  const asked = isFirst ? new URLSearchParams(location.search) : new Map();
  isFirst = false;
  const wanted = asked.get("model") ?? model?.name;
  const next = catalog.named(wanted) ?? catalog.named(store.recall("model")) ?? catalog.first();
  if (next && wanted && next.name !== wanted) notify(`${wanted} is not there any more; ${next.name} answers.`);
  if (next) choose(next);
  compare(catalog.named(asked.get("rival") ?? rival?.name));
  return undefined;
}

function choose(next) {
  const isOther = next.name !== model?.name;
  model = next;
  byId("model-name").textContent = model.name;
  byId("about").textContent = facts(model);
  byId("about").title = `context of ${model.context.toLocaleString("en")} tokens`;
  store.remember("model", model.name);
  if (isOther) settings.use(model);
  compare(rival);
  byId("run-link").hidden = !model.run;
  byId("run-link").href = `run?${new URLSearchParams({ name: model.of ?? model.name })}`;
  if (talk.kind !== kind() && !tree.isEmpty(talk)) return open(null);
  Object.assign(talk, { model: model.name, kind: kind() });
  return isOther ? dress() : undefined;
}

function compare(next) {
  rival = next && next.chat === model?.chat && next.name !== model.name ? next : null;
  byId("rival").textContent = rival?.name ?? "No other";
}

async function pickModel() {
  const next = await pick("Model", catalog.all(), model);
  if (next) choose(next);
}

async function pickRival() {
  const others = catalog.all().filter((m) => m.chat === model?.chat);
  const next = await pick("Compare with", others, rival, "No other", model?.name);
  if (next !== undefined) compare(next);
}

// Conversations

// A conversation that is kept, or (null) a new one.
function open(next) {
  talk = next ?? tree.begin(model?.name ?? null, kind());
  const theirs = catalog.named(talk.model) ?? catalog.ofKind(talk.kind === "chat");
  if (theirs && theirs.name !== model?.name) choose(theirs);
  show();
  closeDrawers();
  if (!next) box.focus();
}

function show(at) {
  view.show(talk, actions, at);
  dress();
}

// Everything that depends on the kind of model, on whether anything was said, and on what is being written.
function dress() {
  const isChat = talk.kind === "chat";
  const isBegun = !tree.isEmpty(talk);
  byId("hello").hidden = isBegun;
  byId("hello-title").textContent = model?.name ?? "fnlm";
  byId("hello-text").textContent = isChat
    ? "Ask it something, or begin with one of these."
    : "This model continues text. Write how it begins, or take one of these.";
  byId("examples").replaceChildren(...examples(talk.kind).map((text) => button(text, () => send(text), "")));
  box.placeholder = isChat ? "Say something" : isBegun ? "Add to the text" : "Begin a text";
  byId("text-label").textContent = isChat ? "Message" : "Text";
  byId("send-label").textContent = isChat ? "Send" : "Write";
  byId("send").hidden = isBusy(talk);
  byId("stop").hidden = !isBusy(talk);
  document.body.classList.toggle("completing", !isChat);
  mark(talk);
}

// A line above the hint, until there is nothing more to say.
function notify(line) {
  byId("notice").textContent = line;
  byId("notice").hidden = !line;
}

const keep = () => notify(store.keep(talk) ? "" : "This browser has no room for more: export and delete some conversations.");

// Turns

function send(text) {
  if (isBusy(talk) || !model || (talk.kind === "chat" && !text.trim())) return;
  if (!text && !tree.isEmpty(talk)) return void goOn();
  if (!settings.chosen(showSettings)) return; // what was written stays in its box
  tree.add(talk, tree.last(talk), { role: "user", content: text });
  box.value = "";
  grow();
  recount(null, "");
  answer(tree.last(talk));
}

// Replies below `parent`: one, or two beside each other with the same seed.
function answer(parent, said = {}) {
  const asked = settings.chosen(showSettings);
  if (!asked) return show();
  if (!rival || said.content) return begin([[model, parent, said]], asked);
  asked.numbers.seed ??= crypto.getRandomValues(new Uint32Array(1))[0];
  const meta = { pair: Date.now() + Math.random() };
  return begin([[rival, parent, { meta: { ...meta } }], [model, parent, { meta: { ...meta } }]], asked);
}

function begin(replies, asked) {
  const mine = talk;
  const nodes = replies.map(([by, parent, said]) => tree.add(mine, parent, { role: "assistant", content: "", ...said, model: by.name }));
  nodes.forEach((node, i) => {
    const [by] = replies[i];
    write(mine, node, request(mine, node, by, asked), () => view.more(node)).then((isKept) => end(mine, node, isKept));
  });
  keep();
  byId("said").textContent = "Writing";
  show();
}

function end(mine, node, isKept) {
  if (mine === talk) view.ended(talk, node, actions);
  dress();
  if (node.meta.step && node.meta.step !== catalog.named(node.model)?.step) refreshModels(); // the run has gone on
  byId("said").textContent = node.error ?? node.content;
  if (!isKept) notify("This browser has no room for more: export and delete some conversations.");
  if (node.error === NEEDS_KEY) askKey().then(refreshModels);
}

// A plain model reads on from the end of the text.
function goOn() {
  if (!isBusy(talk) && !tree.isEmpty(talk)) answer(tree.last(talk));
}

// What the turns on the page can do.
const actions = {
  isWriting,
  isThinking: settings.isThinking,
  show,
  goOn,
  regenerate(node) {
    if (!isBusy(talk)) answer(tree.parentOf(talk, node));
  },
  turnTo(node, by) {
    if (isWriting(node)) return;
    if (tree.turnTo(talk, node, by)) store.keep(talk);
    show("keep");
  },
  // What is said anew is a branch of its own; after one's own words, the model answers.
  edited(node, text) {
    if (isBusy(talk)) return toast("A reply is being written.");
    const { meta, model: by } = node;
    const isMine = node.role === "user";
    const made = tree.add(talk, tree.parentOf(talk, node), { role: node.role, content: text, meta: isMine ? {} : { edited: true, seed: meta.seed }, model: by });
    made.finish = "stop";
    if (isMine) return answer(made);
    keep();
    return show("keep");
  },
  // Another token in the place of the i-th, and on from there.
  branchAt(node, i, text) {
    stop(talk);
    const before = node.tokens.slice(0, i);
    const all = node.tokens[i][2];
    const [, logprob, id] = all.find(([other]) => other === text);
    const content = before.map((token) => token[0]).join("") + text;
    answer(tree.parentOf(talk, node), { content, tokens: [...before, [text, logprob, all, [id]]] });
  },
  prefer(node) {
    tree.choose(talk, node);
    for (const id of tree.parentOf(talk, node).children) delete talk.nodes[id].meta.pair;
    choose(catalog.named(node.model) ?? model);
    keep();
    show("keep");
    box.focus();
  },
};

function search() {
  if (getComputedStyle(byId("history")).visibility === "hidden") slideIn("history");
  byId("search").focus();
}

function editLast() {
  const node = tree.path(talk).findLast((n) => n.role === "user");
  const element = node && document.querySelector(`article[data-id="${CSS.escape(node.id)}"]`);
  if (element) edit(node, element, actions);
}

// Another window changed a conversation: the one shown is shown anew.
function reread(id) {
  const next = id === talk.id && !isBusy(talk) && store.conversation(id);
  if (!next) return draw();
  talk = next;
  return show("keep");
}

// The page's own events

frame();
counter();
talks(open, () => open(null), reread);
keys({
  stop: () => stop(talk),
  begin: () => open(null),
  search,
  turnTo: (by) => { const node = view.branching(talk); if (node) actions.turnTo(node, by); },
  editLast,
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  send(box.value);
});
box.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send(box.value);
});
box.addEventListener("input", () => recount(model, box.value));
byId("stop").addEventListener("click", () => { stop(talk); box.focus(); });
for (const id of ["new", "new-here"]) byId(id).addEventListener("click", () => open(null));
byId("think").addEventListener("change", () => show("keep"));
byId("model-button").addEventListener("click", pickModel);
byId("rival").addEventListener("click", pickRival);
addEventListener("focus", () => isBusy(talk) || refreshModels());

draw();
refreshModels().then(() => {
  show();
  if (matchMedia("(hover: hover)").matches) box.focus();
});
