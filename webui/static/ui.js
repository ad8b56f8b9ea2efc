// Small parts: elements, buttons with icons, a menu, a line that goes away by itself. Text is only ever put into text nodes.

const SVG = "http://www.w3.org/2000/svg";
export const byId = (id) => document.getElementById(id);

export function make(tag, className = "", ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 20 20");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

export function button(label, action, className = "quiet") {
  const node = make("button", className, label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

// A button that shows an icon; its label is read aloud and shown where the pointer rests.
export function iconButton(name, label, action, className = "tool") {
  const node = button("", action, className);
  node.append(icon(name));
  relabel(node, label);
  return node;
}

export function relabel(node, label) {
  node.setAttribute("aria-label", label);
  node.title = label;
}

export async function copy(text, where) {
  const before = where.getAttribute("aria-label");
  const isCopied = navigator.clipboard ? await navigator.clipboard.writeText(text).then(() => true, () => false) : copied(text, where);
  const label = isCopied ? "Copied" : "The browser does not allow it";
  relabel(where, label);
  where.classList.toggle("done", isCopied);
  setTimeout(() => {
    relabel(where, before);
    where.classList.remove("done");
  }, 1500);
}

// The way that is left where the page did not come over TLS or from this machine.
function copied(text, where) {
  const box = make("textarea", "unseen");
  box.value = text;
  where.after(box);
  box.select();
  const isCopied = document.execCommand("copy");
  box.remove();
  where.focus();
  return isCopied;
}

// Places a box that is shown over the page beside what it belongs to, inside the window.
export function beside(box, anchor) {
  const at = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
  const { width, height } = box.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
  const below = at.bottom + 6 + height <= innerHeight - 8 || at.top < height + 14;
  box.style.left = `${left}px`;
  box.style.top = `${Math.max(8, below ? Math.min(at.bottom + 6, innerHeight - height - 8) : at.top - height - 6)}px`;
}

// A menu beside a button: [[label, action], ...]. Arrows move, Escape closes and goes back to the button.
export function menu(anchor, items) {
  const box = make("div", "menu");
  box.setAttribute("role", "menu");
  box.popover = "auto";
  for (const [label, action] of items) {
    const item = button(label, () => {
      box.hidePopover();
      action();
    }, "item");
    item.setAttribute("role", "menuitem");
    box.append(item);
  }
  box.addEventListener("keydown", (event) => arrows(event, [...box.children], "ArrowUp", "ArrowDown"));
  box.addEventListener("toggle", (event) => event.newState === "closed" && box.remove());
  anchor.after(box);
  box.showPopover();
  beside(box, anchor);
  box.firstChild.focus();
}

// Moves the focus within a row or list of elements.
export function arrows(event, nodes, back, forth) {
  const step = event.key === forth ? 1 : event.key === back ? -1 : 0;
  const at = nodes.indexOf(document.activeElement);
  const next = event.key === "Home" ? 0 : event.key === "End" ? nodes.length - 1 : at + step;
  if ((!step && next === at) || !nodes[next]) return;
  event.preventDefault();
  nodes[next].focus();
}

let gone = 0;

// A line at the bottom, with something to do about it ([label, action]).
export function toast(line, todo) {
  const box = byId("toast");
  clearTimeout(gone);
  const close = () => box.replaceChildren();
  box.replaceChildren(make("span", "", line));
  if (todo) box.append(button(todo[0], () => { close(); todo[1](); }, "undo"));
  gone = setTimeout(close, todo ? 10_000 : 5000);
}

export function download(name, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

export function saveName(title) {
  const words = title.normalize("NFKD").replace(/[^\w]+/g, "-").replace(/^-+|-+$/g, "").toLowerCase().slice(0, 40);
  return `fnlm-${words || "conversation"}.json`;
}

export const si = (n) => {
  const [value, unit] = n >= 1e9 ? [n / 1e9, " G"] : n >= 1e6 ? [n / 1e6, " M"] : n >= 1e3 ? [n / 1e3, " k"] : [n, ""];
  return (value < 100 ? Number(value.toPrecision(3)) : Math.round(value)) + unit;
};
