// What a plain model writes: one text, of which some parts were given and some were written.

import { adder, arrowsOf, described, edit, look, modes, problem } from "./turn.js";
import { copy, iconButton, make } from "./ui.js";

export const textOf = (nodes) => nodes.map((node) => node.content).join("");

export function documentOf(talk, shown, actions, parts) {
  const element = make("article", "turn document");
  const words = make("div", "words plain");
  const end = shown.at(-1);
  for (const node of shown) {
    if (node !== end) words.append(...arrowsOf(talk, node, actions));
    const segment = make("span", node.role === "user" ? "given" : "written");
    segment.dataset.id = node.id;
    words.append(segment);
    parts.set(node.id, { element, add: fill(segment, node, actions) });
  }
  const dropped = shown.findLast((node) => node.meta.dropped)?.meta.dropped;
  if (dropped) element.append(make("p", "note", `The text is longer than what the model reads: its first ${dropped} tokens were left out.`));
  element.append(words);
  if (actions.isWriting(end)) words.classList.add("writing");
  else {
    if (end.error) element.append(problem(end.error));
    element.append(tools(talk, shown, element, actions));
  }
  return element;
}

function fill(segment, node, actions) {
  const isThought = actions.isWriting(node) ? actions.isThinking() : look(node, actions.isThinking()) === "thoughts";
  segment.replaceChildren();
  return adder(segment, node, isThought, actions);
}

function tools(talk, shown, element, actions) {
  const end = shown.at(-1);
  const row = make("div", "tools");
  const copying = iconButton("copy", "Copy the text", () => copy(textOf(shown), copying));
  row.append(copying, iconButton("edit", "Edit the text", () => edit({ ...shown[0], role: "user" }, element, actions, textOf(shown))));
  if (end.role === "assistant") {
    row.append(iconButton("again", "Write the last part anew", () => actions.regenerate(end)));
    if (end.tokens?.length) row.append(thoughts(end, element, actions));
  }
  row.append(...arrowsOf(talk, end, actions));
  const goOn = iconButton("forth", "Go on", () => actions.goOn(), "quiet");
  goOn.replaceChildren("Go on");
  row.append(goOn);
  const line = end.role === "assistant" ? described(end, false) : "";
  if (line) row.append(make("span", "figures", line));
  return row;
}

function thoughts(end, element, actions) {
  const segment = [...element.querySelectorAll(".written")].at(-1);
  const toggle = modes(end, make("div"), actions).at(-1);
  toggle.addEventListener("click", () => fill(segment, end, actions));
  return toggle;
}
