// The choice of a model: all of them with size, step and loss, and a search where there are many.

import { checkpoints } from "./catalog.js";
import { arrows, button, byId, make, si } from "./ui.js";

const dialog = byId("picker");
const search = byId("picker-search");
const list = byId("picker-list");
const MANY = 7;

export const facts = (m) =>
  [`${si(m.parameters)} parameters`, m.step ? `step ${m.step.toLocaleString("en")}` : "", Number.isFinite(m.loss) ? `loss ${m.loss.toFixed(3)}` : ""]
    .filter(Boolean).join(" · ");

// Resolves with the model that is chosen (`none`, if given, is a line that chooses nothing), or undefined. `without` is
// the name of one that cannot be chosen.
export function pick(title, models, current, none, without) {
  byId("picker-title").textContent = title;
  byId("picker-search-box").hidden = models.length < MANY;
  search.value = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const take = (model) => {
      resolve(model);
      dialog.close();
    };
    const draw = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const matches = (m) => words.every((word) => `${m.name} ${m.chat ? "chat" : "text"}`.toLowerCase().includes(word));
      const rowsOf = (all) => all.filter((m) => m.name !== without && matches(m)).map((m) => rowOf(m, m.name === current?.name, () => take(m)));
      const rows = models.flatMap((m) => {
        const own = checkpoints(m).filter((c) => c.name !== without && matches(c));
        const isOpen = own.some((c) => c.name === current?.name) || words.some((word) => word.includes("@"));
        return [...rowsOf([m]), ...(own.length ? [folded(m, m.checkpoints.length, () => rowsOf(own), isOpen)] : [])];
      });
      if (none && !words.length) rows.unshift(make("li", "", button(none, () => take(null), "choice")));
      list.replaceChildren(...(rows.length ? rows : [make("li", "empty", "Nothing found.")]));
    };
    search.oninput = draw;
    dialog.onclose = () => resolve(undefined);
    draw();
    (byId("picker-search-box").hidden ? list.querySelector("[aria-current]") ?? list.querySelector("button") : search)?.focus();
  });
}

function rowOf(model, isCurrent, action) {
  const choice = button("", action, "choice");
  const kind = make("span", "kind", model.chat ? "chat" : "text");
  choice.append(make("span", "choice-name", model.name), kind, make("span", "choice-facts", facts(model)));
  if (isCurrent) choice.setAttribute("aria-current", "true");
  return make("li", "", choice);
}

// The checkpoints of a run, shown when they are asked for.
function folded(model, count, rows, isOpen) {
  const list = make("ul", "choices");
  const toggle = button(count === 1 ? "1 checkpoint" : `${count} checkpoints`, () => open(list.hidden), "quiet fold");
  const open = (isShown) => {
    list.hidden = !isShown;
    if (isShown && !list.firstChild) list.append(...rows());
    toggle.setAttribute("aria-expanded", String(isShown));
  };
  toggle.setAttribute("aria-label", `${toggle.textContent} of ${model.name}`);
  open(isOpen);
  return make("li", "", toggle, list);
}

dialog.addEventListener("keydown", (event) => {
  const buttons = [...list.querySelectorAll("button")];
  if (document.activeElement === search) {
    if (event.key === "ArrowDown") buttons[0]?.focus();
    if (event.key === "Enter") buttons[0]?.click();
  } else arrows(event, buttons, "ArrowUp", "ArrowDown");
});
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
