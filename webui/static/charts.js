// Charts as the server draws them: let through by an allow-list, put in the place of the earlier ones, and read out under
// the pointer.

import { make } from "./ui.js";

const SVG = "http://www.w3.org/2000/svg";
const HTML_TAGS = new Set("FIGURE FIGCAPTION B SPAN UL LI DIV DETAILS SUMMARY TABLE CAPTION THEAD TBODY TR TH TD".split(" "));
const SVG_TAGS = new Set(["svg", "path", "line", "text", "title"]);
const KEPT = new Set(
  "class hidden scope role width height viewBox preserveAspectRatio aria-label aria-hidden d x y x1 x2 y1 y2 dy data-low data-high".split(" "),
);

function copied(node) {
  if (node.nodeType === Node.TEXT_NODE) return document.createTextNode(node.data);
  const isDrawn = node.namespaceURI === SVG;
  if (!(isDrawn ? SVG_TAGS : HTML_TAGS).has(node.tagName)) return "";
  const made = isDrawn ? document.createElementNS(SVG, node.tagName) : document.createElement(node.tagName);
  for (const { name, value } of node.attributes) if (KEPT.has(name)) made.setAttribute(name, value);
  made.append(...[...node.childNodes].map(copied));
  return made;
}

// Draws the charts of `html` in `box`. What was folded out stays so, and the numbers stay under the pointer.
export function drawCharts(box, html) {
  const source = new DOMParser().parseFromString(html, "text/html");
  const before = new Map([...box.children].map((figure) => [titleOf(figure), figure]));
  box.replaceChildren(...[...source.querySelectorAll("figure")].map((figure) => {
    const made = copied(figure);
    const old = before.get(titleOf(figure));
    const details = made.querySelector("details");
    if (details) details.open = Boolean(old?.querySelector("details")?.open);
    const show = pointed(made, JSON.parse(figure.querySelector("script").textContent));
    if (old?.at !== undefined) show(old.at);
    return made;
  }));
}

const titleOf = (figure) => figure.querySelector("b")?.textContent;

// Shows the nearest point of each curve to the pointer; the result shows what is at a part of the width.
function pointed(figure, lines) {
  const field = figure.querySelector(".field");
  const tip = figure.querySelector(".tip");
  const [low, high] = [Number(field.dataset.low), Number(field.dataset.high)];
  const cross = document.createElementNS(SVG, "line");
  cross.setAttribute("class", "cross");
  const show = (part) => {
    figure.at = part;
    const step = low + part * (high - low);
    const here = lines.map(({ x }) => nearest(x, step));
    const steps = lines.map(({ x }, i) => x[here[i]]);
    const at = steps.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a));
    const said = lines.map(({ name, colour, y }, i) => make("div", colour, make("span", "", `${name} ${y[here[i]]}${elsewhere(steps[i], at)}`)));
    tip.replaceChildren(make("div", "at", `step ${at.toLocaleString("en")}`), ...said);
    tip.hidden = false;
    const x = high > low ? (at - low) / (high - low) : 0;
    for (const [name, value] of [["x1", 1000 * x], ["x2", 1000 * x], ["y1", 0], ["y2", 1000]]) cross.setAttribute(name, value);
    field.querySelector("svg").append(cross);
    tip.style.left = x < 0.5 ? `${100 * x}%` : "auto";
    tip.style.right = x < 0.5 ? "auto" : `${100 * (1 - x)}%`;
  };
  const moved = (event) => {
    const { left, width } = field.getBoundingClientRect();
    show(Math.min(1, Math.max(0, (event.clientX - left) / width)));
  };
  field.addEventListener("pointermove", moved);
  field.addEventListener("pointerdown", moved);
  field.addEventListener("pointerleave", () => {
    figure.at = undefined;
    tip.hidden = true;
    cross.remove();
  });
  return show;
}

const elsewhere = (step, at) => (step === at ? "" : ` (at ${step.toLocaleString("en")})`);

// Where in a growing list the nearest value to `step` is.
function nearest(x, step) {
  let [from, to] = [0, x.length - 1];
  while (to - from > 1) {
    const middle = (from + to) >> 1;
    if (x[middle] < step) from = middle;
    else to = middle;
  }
  return step - x[from] < x[to] - step ? from : to;
}
