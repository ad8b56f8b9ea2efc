// The nearest point of each curve to the pointer, as texts; the numbers are also in tables, for who has no pointer.
"use strict";
for (const chart of document.querySelectorAll(".chart")) {
  const field = chart.querySelector(".field"), tip = chart.querySelector(".tip"), plot = field.querySelector("svg");
  const lines = JSON.parse(chart.querySelector("script").textContent);
  const low = Number(field.dataset.low), high = Number(field.dataset.high);
  const cross = document.createElementNS(plot.namespaceURI, "line");
  cross.setAttribute("class", "cross");
  const nearest = (x, step) => {
    let from = 0, to = x.length - 1;
    while (to - from > 1) {
      const middle = (from + to) >> 1;
      if (x[middle] < step) from = middle; else to = middle;
    }
    return step - x[from] < x[to] - step ? from : to;
  };
  const row = (kind, words) => {
    const line = document.createElement("div"), text = document.createElement("span");
    line.className = kind;
    text.textContent = words;
    line.append(text);
    return line;
  };
  const show = event => {
    const box = field.getBoundingClientRect();
    const part = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const step = low + part * (high - low);
    const here = lines.map(line => nearest(line.x, step));
    const steps = lines.map((line, i) => line.x[here[i]]);
    const at = steps.reduce((a, b) => Math.abs(b - step) < Math.abs(a - step) ? b : a);
    tip.replaceChildren(row("step", "step " + at.toLocaleString("en")), ...lines.map((line, i) =>
      row(line.colour, line.name + "  " + line.y[here[i]] + (steps[i] === at ? "" : " (at " + steps[i].toLocaleString("en") + ")"))));
    tip.hidden = false;
    const x = (at - low) / (high - low);
    for (const [name, value] of [["x1", 1000 * x], ["x2", 1000 * x], ["y1", 0], ["y2", 1000]]) cross.setAttribute(name, value);
    plot.append(cross);
    tip.style.left = x < 0.5 ? 100 * x + "%" : "auto";
    tip.style.right = x < 0.5 ? "auto" : 100 * (1 - x) + "%";
    tip.style.margin = "0 10px";
  };
  const hide = () => { tip.hidden = true; cross.remove(); };
  field.addEventListener("pointermove", show);
  field.addEventListener("pointerdown", show);
  field.addEventListener("pointerleave", hide);
}
