// What the model was thinking: each token of a reply with its probability, coloured by surprise, and what else it might
// have said. A token is [text, log-probability, [[text, log-probability, id], ...], ids].

import { arrows, beside, button, byId, make } from "./ui.js";

const card = byId("thought");
const BITS = [0.5, 1.5, 3, 5, 8]; // where a token becomes a shade more surprising

const decoded = (bytes) => {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(new Uint8Array(bytes));
  } catch {
    return null;
  }
};

// Reads tokens as they come; those that share a character become one. `tokens` holds what was read.
export function collector(tokens = []) {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  let open = null;
  return {
    tokens,
    take(content) {
      for (const { bytes, logprob, id, top } of content) {
        open ??= { logprob: 0, ids: [], top };
        open.logprob += logprob;
        open.ids.push(id ?? -1);
        const text = decoder.decode(new Uint8Array(bytes), { stream: true });
        if (!text) continue; // the rest of the character comes with the next
        tokens.push([text, rounded(open.logprob), alternatives(open.top), open.ids]);
        open = null;
      }
    },
  };
}

const alternatives = (top) =>
  top.map(({ bytes, logprob, id }) => [decoded(bytes), rounded(logprob), id ?? -1]).filter(([text]) => text);
const rounded = (value) => Math.round(value * 1000) / 1000;
const shade = (logprob) => BITS.filter((bits) => -logprob / Math.LN2 > bits).length;

export function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value >= 9.95 ? `${value.toFixed(0)} %` : value >= 0.095 ? `${value.toFixed(1)} %` : "< 0.1 %";
}

export const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/^ +| +$/g, (s) => "·".repeat(s.length));

// Makes elements of tokens as they come, each call of those that are new, with the spaces between words beside them;
// `branch(index, text)` says another in a token's place.
export function painter(branch) {
  const nodes = [];
  return (tokens) => tokens.slice(nodes.length).flatMap((token) => {
    const node = element(token, nodes.length, nodes, branch);
    nodes.push(node);
    return [token[0].slice(0, token[0].length - node.textContent.length), node];
  });
}

function element(token, i, nodes, branch) {
  const word = token[0].replace(/^ +(?=\S)/, "");
  const node = make("span", `token surprise-${shade(token[1])}${word.startsWith("\n") ? " breaks" : ""}`, word);
  node.tabIndex = i === 0 ? 0 : -1;
  node.setAttribute("role", "button");
  node.setAttribute("aria-label", `${visible(token[0])}, ${percent(token[1])}`);
  node.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(node, token, i, branch, false));
  node.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && leave());
  node.addEventListener("click", () => show(node, token, i, branch, true));
  node.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      show(node, token, i, branch, true);
      card.querySelector("button")?.focus();
    } else if (event.key === "Escape" && shown) {
      event.preventDefault();
      close();
    } else arrows(event, nodes, "ArrowLeft", "ArrowRight");
  });
  return node;
}

let pinned = null; // the token whose card stays
let shown = null; // the token whose card is open
let hiding = 0;

function show(node, token, index, branch, pin) {
  clearTimeout(hiding);
  if (pinned && !pin) return;
  if (pin) pinned = node;
  if (shown !== node) {
    shown?.classList.remove("held");
    shown = node;
    node.classList.add("held");
    card.replaceChildren(...about(token, index, branch));
  }
  if (!card.matches(":popover-open")) card.showPopover();
  beside(card, node);
}

function leave() {
  if (!pinned) hiding = setTimeout(close, 150);
}

export function close() {
  if (card.matches(":popover-open")) card.hidePopover();
  shown?.classList.remove("held");
  pinned = shown = null;
}

function about([text, logprob, alternatives = []], index, branch) {
  const bits = (-logprob / Math.LN2).toFixed(1);
  const head = make("p", "thought-head", make("code", "", visible(text)), make("span", "", `${percent(logprob)} · ${bits} bits`));
  const others = alternatives.some(([t]) => t === text) ? alternatives : [...alternatives, [text, logprob]];
  const rows = others.sort((a, b) => b[1] - a[1]).map(([other, p]) => row(other, p, other === text, branch && (() => branch(index, other))));
  const hint = alternatives.length && branch ? make("p", "thought-hint", "Choose another to go on from there.") : null;
  return [head, make("ol", "thoughts", ...rows), hint].filter(Boolean);
}

function row(text, logprob, isSaid, action) {
  const bar = make("span", "bar");
  bar.style.width = `${Math.max(1, 100 * Math.exp(logprob))}%`;
  const parts = [make("code", "", visible(text)), make("span", "share", percent(logprob)), bar];
  if (isSaid || !action) return make("li", isSaid ? "said" : "", make("div", "option", ...parts));
  const choice = button("", () => { close(); action(); }, "option");
  choice.append(...parts);
  return make("li", "", choice);
}

card.addEventListener("pointerenter", () => clearTimeout(hiding));
card.addEventListener("pointerleave", leave);
card.addEventListener("keydown", (event) => {
  const node = shown;
  if (event.key === "Escape") {
    event.stopPropagation();
    close();
    node?.focus();
  } else arrows(event, [...card.querySelectorAll("button")], "ArrowUp", "ArrowDown");
});
document.addEventListener("pointerdown", (event) => {
  if (shown && !card.contains(event.target) && !shown.contains(event.target)) close();
});
// The card goes with its token, as long as that can be seen: a reply that is being written moves.
byId("scroll").addEventListener("scroll", () => {
  if (!shown) return;
  const [at, frame] = [shown.getBoundingClientRect(), byId("scroll").getBoundingClientRect()];
  if (shown.isConnected && at.bottom > frame.top && at.top < frame.bottom) beside(card, shown);
  else close();
}, { passive: true });
