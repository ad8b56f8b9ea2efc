// Replies in Markdown: rendered and cleaned by the server, and let through here by an allow-list once more.

import * as api from "./api.js";
import { copy, iconButton, make } from "./ui.js";

const TAGS = new Set(
  ("A BLOCKQUOTE BR CODE DEL EM H1 H2 H3 H4 H5 H6 HR LI OL P PRE STRONG TABLE TBODY TD TH THEAD TR S UL").split(" "),
);
const KEPT = { OL: ["start"], TD: ["align"], TH: ["align"] };
const MOST_LETTERS = 20_000; // in one reply; a longer one stays as it was written
const MOST_AT_ONCE = 60_000;
const known = new Map();

// Copies what is allowed out of an inert document: no scripts run in it, and nothing is loaded.
function copied(from, to) {
  for (const node of from.childNodes) {
    if (node.nodeType === Node.TEXT_NODE) to.append(node.data);
    else if (TAGS.has(node.tagName)) to.append(element(node));
    else copied(node, to);
  }
  return to;
}

function element(node) {
  const made = copied(node, document.createElement(node.tagName));
  for (const name of KEPT[node.tagName] ?? []) if (node.hasAttribute(name)) made.setAttribute(name, node.getAttribute(name));
  if (node.tagName === "A" && /^(https?|mailto):/i.test(node.getAttribute("href") ?? "")) {
    made.href = node.getAttribute("href");
    made.target = "_blank";
    made.rel = "noopener noreferrer nofollow";
  }
  if (node.tagName === "PRE") return block(made, node);
  return node.tagName === "TABLE" ? make("div", "wide", made) : made;
}

// Code with its language and a button to copy it.
function block(pre, source) {
  const language = /language-([\w+#.-]{1,30})/.exec(source.firstElementChild?.className ?? "")?.[1] ?? "";
  const button = iconButton("copy", "Copy code", () => copy(pre.textContent.replace(/\n$/, ""), button));
  pre.tabIndex = 0;
  return make("div", "code", make("div", "code-head", make("span", "", language || "code"), button), pre);
}

const built = (html) => copied(new DOMParser().parseFromString(html, "text/html").body, document.createDocumentFragment());

let waiting = new Map();

// Shows a text in Markdown in `place` once the server has rendered it; several at a time go in one request.
export function format(text, place) {
  if (known.has(text)) return place(built(known.get(text)));
  if (text.length > MOST_LETTERS) return undefined;
  if (!waiting.size) setTimeout(ask, 0);
  waiting.set(text, [...(waiting.get(text) ?? []), place]);
  return undefined;
}

async function ask() {
  const all = [...waiting];
  waiting = new Map();
  while (all.length) {
    const batch = [];
    for (let letters = 0; all.length && batch.length < 100 && (letters += all[0][0].length) < MOST_AT_ONCE; ) batch.push(all.shift());
    const html = await api.markdown(batch.map(([text]) => text)).catch(() => []); // the text stands as it is
    batch.forEach(([text, places], i) => {
      if (typeof html[i] !== "string") return;
      known.set(text, html[i]);
      for (const place of places) place(built(html[i]));
    });
  }
}
