// The list of kept conversations: search, rename, delete with undo, export and import.

import * as store from "./store.js";
import { path, restored, titled } from "./tree.js";
import { button, byId, download, iconButton, make, menu, saveName, toast } from "./ui.js";
import { isBusy, stop } from "./writing.js";

const search = byId("search");
const list = byId("conversations");
let current = null;
let open = () => {};

// `opened` shows a conversation, `begun` a new one; `changed` hears of what another window did.
export function talks(opened, begun, changed) {
  open = opened;
  search.addEventListener("input", draw);
  search.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !search.value) return;
    event.stopPropagation();
    search.value = "";
    draw();
  });
  byId("more").addEventListener("click", () => menu(byId("more"), [
    ["Import from a file", () => byId("file").click()],
    ...(store.conversations().length ? [["Export all", exportAll], ["Delete all", () => removeAll(begun)]] : []),
  ]));
  byId("file").addEventListener("change", () => importFrom(byId("file").files[0]));
  store.watch(changed);
}

export function mark(talk) {
  current = talk;
  document.title = talk.title ? `${talk.title} - fnlm` : "fnlm";
  draw();
}

const matches = (talk, words) => {
  const said = Object.values(talk.nodes).map((node) => node.content ?? "");
  const text = [talk.title, ...said].join("\n").toLowerCase();
  return words.every((word) => text.includes(word));
};

export function draw() {
  const all = store.conversations();
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = all.filter((talk) => matches(talk, words));
  const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
  list.replaceChildren(...found.map(rowOf));
  byId("none").hidden = found.length > 0;
  byId("none").textContent = all.length ? "Nothing found." : "Conversations stay in this browser.";
  byId("search-box").hidden = all.length < 2;
  list.querySelector(`li[data-id="${CSS.escape(focused ?? "-")}"] .title`)?.focus();
}

function rowOf(talk) {
  const row = make("li", talk.id === current?.id ? "current" : "");
  const name = talk.title || "Untitled";
  const title = button(name, () => open(talk), isBusy(talk) ? "title busy" : "title");
  title.title = name;
  if (talk.id === current?.id) title.setAttribute("aria-current", "true");
  title.addEventListener("dblclick", () => rename(talk, row));
  const more = iconButton("dots", `More for ${name}`, () => menu(more, [
    ["Rename", () => rename(talk, row)],
    ["Export", () => download(saveName(name), exported([talk]))],
    ["Delete", () => remove(talk)],
  ]));
  row.dataset.id = talk.id;
  row.append(title, more);
  return row;
}

function rename(talk, row) {
  const box = make("input");
  box.value = talk.title;
  box.maxLength = 100;
  box.setAttribute("aria-label", "Name of the conversation");
  let isDone = false;
  const end = (isKept) => {
    if (isDone) return;
    isDone = true;
    if (isKept && box.value.trim()) {
      Object.assign(talk, { title: titled(box.value), named: true });
      store.keep(talk);
    }
    mark(current);
    list.querySelector(`li[data-id="${CSS.escape(talk.id)}"] .title`)?.focus();
  };
  box.addEventListener("blur", () => end(true));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") event.stopPropagation();
    if (event.key === "Enter" || event.key === "Escape") end(event.key === "Enter");
  });
  row.replaceChildren(box);
  box.select();
}

function remove(talk) {
  stop(talk);
  store.forget(talk.id);
  if (talk.id === current.id) open(null);
  else draw();
  toast(`Deleted “${talk.title || "Untitled"}”`, ["Undo", () => { store.keep(talk); open(talk); }]);
}

function removeAll(begun) {
  const all = store.conversations();
  all.forEach(stop);
  for (const talk of all) store.forget(talk.id);
  begun();
  toast(`Deleted ${counted(all.length)}`, ["Undo", () => { all.forEach(store.keep); draw(); }]);
}

const counted = (n) => (n === 1 ? "1 conversation" : `${n} conversations`);
const exported = (all) => JSON.stringify({ format: "fnlm conversations", version: 1, conversations: all }, null, 1);
const exportAll = () => download(saveName("conversations"), exported(store.conversations()));

async function importFrom(file) {
  byId("file").value = "";
  if (!file) return;
  let found = [];
  try {
    const value = JSON.parse(await file.text());
    const all = Array.isArray(value) ? value : Array.isArray(value?.conversations) ? value.conversations : [value];
    const isHere = (talk) => talk?.id && store.conversation(talk.id)?.changed === talk.changed;
    const others = all.filter((talk) => !isHere(talk));
    if (all.length && !others.length) return toast(`What ${file.name} holds is here already.`);
    found = others.map((talk) => restored(talk, !store.conversation(talk?.id))).filter((talk) => talk && path(talk).length);
  } catch {
    found = [];
  }
  if (!found.length) return toast(`${file.name} holds no conversations.`);
  const areKept = found.map(store.keep).every(Boolean);
  open(found[0]);
  toast(areKept ? `Imported ${counted(found.length)}` : "Imported, but this browser has no room to keep all of them.");
}
