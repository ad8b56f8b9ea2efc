// The settings beside the conversation, kept apart for chat models and plain ones.

import { keepSettings, settings } from "./store.js";

const form = document.getElementById("knobs");
const slider = document.getElementById("slider");
const { temperature } = form.elements;
let kind = null;

export function use(next) {
  if (next === kind) return;
  kind = next;
  const values = settings(kind);
  for (const field of form.elements) if (field.name) field.value = values[field.name] ?? "";
  document.getElementById("system-field").hidden = kind !== "chat";
  slider.value = temperature.value;
}

function values() {
  const found = {};
  for (const field of form.elements) {
    if (!field.name) continue;
    found[field.name] = field.type === "number" ? (field.value === "" ? null : Number(field.value)) : field.value;
  }
  return found;
}

// What a request takes; null where a field is wrong, which is then shown.
export function chosen() {
  if (!form.reportValidity()) return null;
  const { system, ...numbers } = values();
  if (numbers.max_tokens !== null) numbers.min_tokens = Math.min(numbers.min_tokens ?? 0, numbers.max_tokens);
  return { system: kind === "chat" ? system.trim() : "", numbers };
}

slider.addEventListener("input", () => {
  temperature.value = slider.value;
});
temperature.addEventListener("input", () => {
  slider.value = temperature.value;
});
form.addEventListener("input", () => {
  if (form.checkValidity()) keepSettings(kind, values());
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", (event) => {
  event.preventDefault();
  const mine = kind;
  kind = null;
  keepSettings(mine, {});
  use(mine);
});
