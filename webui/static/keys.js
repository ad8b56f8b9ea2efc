// The keyboard beyond the message box, and the page that tells of it.

import { byId } from "./ui.js";

const isTyping = (node) => node.matches?.("input, textarea, select, [role=button], [role=menuitem]");

// `todo` has stop, begin, search, turnTo(by) and editLast.
export function keys(todo) {
  byId("show-help").addEventListener("click", () => byId("help").showModal());
  byId("help").addEventListener("click", (event) => event.target === byId("help") && byId("help").close());
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.isComposing) return;
    const isCommand = event.ctrlKey || event.metaKey;
    if (isCommand && event.key === "/") toggleHelp();
    else if (isCommand && event.key.toLowerCase() === "k") todo.search();
    else if (isCommand && event.shiftKey && event.key.toLowerCase() === "o") todo.begin();
    else if (document.querySelector("dialog[open]") || isCommand || event.altKey) return;
    else if (event.key === "Escape") return void todo.stop();
    else if (event.key === "ArrowUp" && event.target === byId("text") && !byId("text").value) todo.editLast();
    else if (["ArrowLeft", "ArrowRight"].includes(event.key) && isFree(event.target)) todo.turnTo(event.key === "ArrowLeft" ? -1 : 1);
    else return;
    event.preventDefault();
  });
}

const isFree = (node) => !isTyping(node) || (node === byId("text") && !node.value);

function toggleHelp() {
  if (byId("help").open) byId("help").close();
  else if (!document.querySelector("dialog[open]")) byId("help").showModal();
}
