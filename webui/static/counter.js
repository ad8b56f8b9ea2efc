// The prompt as the model reads it: how many tokens while it is typed, and which.

import * as api from "./api.js";
import { visible } from "./tokens.js";
import { byId, make } from "./ui.js";

const count = byId("count");
const pieces = byId("pieces");
const WAIT = 250; // ms without a key before the server is asked
let timer = 0;
let asking = null;
let isThere = true; // until the server says that it cannot

export function counter() {
  count.addEventListener("click", () => {
    pieces.hidden = !pieces.hidden;
    count.setAttribute("aria-expanded", String(!pieces.hidden));
  });
}

// Counts the tokens of `text` for a model, a little later.
export function recount(model, text) {
  clearTimeout(timer);
  asking?.abort();
  if (!text || !model || !isThere) return hide();
  timer = setTimeout(() => ask(model, text), WAIT);
  return undefined;
}

function hide() {
  count.hidden = pieces.hidden = true;
  count.setAttribute("aria-expanded", "false");
  pieces.replaceChildren();
}

async function ask(model, text) {
  asking = new AbortController();
  try {
    draw(await api.tokenize(model.name, { text }, asking.signal), model);
  } catch (error) {
    if (error.status === 404) isThere = false;
    if (error.name !== "AbortError") hide();
  }
}

function draw(tokens, model) {
  const many = tokens.length > 2000 ? tokens.slice(0, 2000) : tokens;
  count.hidden = false;
  count.textContent = tokens.length === 1 ? "1 token" : `${tokens.length.toLocaleString("en")} tokens`;
  count.classList.toggle("bad", tokens.length >= model.context);
  count.title = `of ${model.context.toLocaleString("en")} that the model can read; press to see them`;
  pieces.replaceChildren(...many.flatMap(({ id, text, special }) => {
    const piece = make("span", special ? "piece special" : "piece", visible(text));
    piece.title = `token ${id}`;
    return text.endsWith("\n") ? [piece, make("br")] : [piece];
  }));
}
