// One turn of a conversation: its words, what can be done with them, and how they can be looked at.

import { format } from "./markdown.js";
import { painter } from "./tokens.js";
import { branch } from "./tree.js";
import { copy, iconButton, make, relabel } from "./ui.js";

const looks = new Map(); // how a turn is looked at, by its id: "plain", "thoughts" or "formatted"

export const look = (node, isThinking) => looks.get(node.id) ?? (isThinking && node.tokens?.length ? "thoughts" : "formatted");

// A turn as {element, add}; `add` writes more of a reply at the pace of the screen.
export function turnOf(talk, node, actions) {
  const isMine = node.role === "user";
  const element = make("article", `turn ${isMine ? "mine" : "reply"}`);
  element.dataset.id = node.id;
  const words = make("div", "words");
  element.append(make("h2", "unseen", isMine ? "You" : "Model"));
  if (node.meta.dropped) element.append(make("p", "note", outgrown(node.meta.dropped)));
  element.append(words);
  const add = fill(words, node, actions);
  if (actions.isWriting(node)) words.classList.add("writing");
  else {
    if (node.error) element.append(problem(node.error));
    element.append(tools(talk, node, element, actions));
  }
  return { element, add };
}

// What is said, as it is looked at; the result adds more of it while it is being written.
function fill(words, node, actions) {
  const mode = modeOf(node, actions);
  words.className = `words ${mode}`;
  words.replaceChildren();
  const add = adder(words, node, mode === "thoughts", actions);
  if (mode === "formatted") asMarkdown(words, node, actions);
  return add;
}

function modeOf(node, actions) {
  if (node.role === "user") return "plain";
  if (actions.isWriting(node)) return actions.isThinking() ? "thoughts" : "plain";
  const chosen = look(node, actions.isThinking());
  return actions.isPlain && chosen === "formatted" ? "plain" : chosen;
}

function asMarkdown(words, node, actions) {
  words.classList.replace("formatted", "plain");
  format(node.content, (fragment) => {
    if (look(node, actions.isThinking()) !== "formatted") return;
    words.classList.replace("plain", "formatted");
    words.replaceChildren(fragment);
  });
}

// Shows what a turn says, and then what is added to it, once a frame, however fast it comes: as text, or as tokens
// where these are known.
export function adder(place, node, isThought, actions) {
  const paint = painter((i, text) => actions.branchAt(node, i, text));
  const text = place.appendChild(document.createTextNode(""));
  let isWaiting = false;
  const draw = () => {
    if (isThought && node.tokens?.length) {
      text.data = "";
      place.append(...paint(node.tokens));
    } else if (text.length < node.content.length) text.appendData(node.content.slice(text.length));
  };
  draw();
  return (then) => {
    if (isWaiting) return;
    isWaiting = true;
    requestAnimationFrame(() => {
      isWaiting = false;
      draw();
      then();
    });
  };
}

export function problem(line) {
  const note = make("p", "note bad", line);
  note.setAttribute("role", "alert");
  return note;
}

const outgrown = (n) =>
  `The conversation outgrew what the model can read: its oldest ${n === 1 ? "message was" : `${n} messages were`} left out.`;

function tools(talk, node, element, actions) {
  const row = make("div", "tools");
  const isMine = node.role === "user";
  const copying = iconButton("copy", "Copy", () => copy(node.content, copying));
  row.append(copying, iconButton("edit", "Edit", () => edit(node, element, actions)));
  if (!isMine) {
    row.append(iconButton("again", "Regenerate", () => actions.regenerate(node)));
    row.append(...modes(node, element.querySelector(".words"), actions));
  }
  row.append(...arrowsOf(talk, node, actions));
  const line = isMine ? "" : described(node, actions.several);
  if (line) row.append(make("span", "figures", line));
  return row;
}

// The buttons that change how a reply is looked at.
export function modes(node, words, actions) {
  const toggles = [["plain", "raw", "Raw text"]];
  if (node.tokens?.length) toggles.push(["thoughts", "thought", "Probability of each token"]);
  const nodes = toggles.map(([mode, name, label]) => iconButton(name, label, () => {
    looks.set(node.id, look(node, actions.isThinking()) === mode ? "formatted" : mode);
    fill(words, node, actions);
    press();
  }));
  const press = () => nodes.forEach((n, i) => n.setAttribute("aria-pressed", look(node, actions.isThinking()) === toggles[i][0]));
  press();
  return nodes;
}

// ‹ 1/3 › where a turn has siblings.
export function arrowsOf(talk, node, actions) {
  const { index, count } = branch(talk, node);
  if (count < 2) return [];
  const back = iconButton("back", "Branch before", () => actions.turnTo(node, -1));
  const forth = iconButton("forth", "Branch after", () => actions.turnTo(node, 1));
  back.disabled = index === 0;
  forth.disabled = index === count - 1;
  const where = make("span", "count", `${index + 1}/${count}`);
  where.setAttribute("aria-label", `branch ${index + 1} of ${count}`);
  const group = make("span", "branches", back, where, forth);
  group.setAttribute("role", "group");
  return [group];
}

// A turn's words in a box, in its own place.
export function edit(node, element, actions, text = node.content) {
  const box = make("textarea");
  const isMine = node.role === "user";
  box.value = text;
  box.rows = 1;
  box.setAttribute("aria-label", "New words");
  const grow = () => {
    box.style.height = "auto";
    box.style.height = `${box.scrollHeight + 2}px`;
  };
  const save = make("button", "send", isMine ? "Send" : "Save");
  const leave = iconButton("close", "Cancel", () => actions.show("keep"), "quiet");
  leave.replaceChildren("Cancel");
  const form = make("form", "editing", box, make("div", "tools", save, leave));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    actions.edited(node, box.value);
  });
  box.addEventListener("input", grow);
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      actions.show("keep");
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });
  element.replaceChildren(form);
  element.classList.add("is-edited");
  grow();
  box.focus();
}

// Two models' replies to the same words and seed, side by side.
export function pairOf(talk, nodes, actions, parts) {
  const columns = nodes.map((node) => {
    const part = turnOf(talk, node, { ...actions, several: false, isPlain: talk.kind === "text" });
    parts.set(node.id, part);
    const keep = iconButton("forth", "", () => actions.prefer(node), "quiet keep");
    keep.replaceChildren("Go on");
    relabel(keep, `Go on with the reply of ${node.model}`);
    part.element.querySelector(".branches")?.remove();
    part.element.prepend(make("div", "whose", named(node.model), actions.isWriting(node) ? null : keep));
    return part.element;
  });
  return make("div", "pair", ...columns);
}

function named(model) {
  const name = make("strong", "", model);
  name.title = model;
  return name;
}

// What there is to know of a reply: who answered, at which step, how fast, and from which seed.
export function described({ finish, meta, model }, several) {
  const ends = { stopped: "stopped", length: "ended by its length", error: "did not finish" };
  const speed = meta.tokens && meta.seconds ? `${meta.tokens} tokens, ${Math.round(meta.tokens / meta.seconds)} a second` : "";
  const step = meta.step ? `step ${meta.step.toLocaleString("en")}` : "";
  const seed = meta.seed !== undefined ? `seed ${meta.seed}` : "";
  return [several ? model : "", meta.edited ? "edited" : ends[finish], step, speed, seed].filter(Boolean).join(" · ");
}
