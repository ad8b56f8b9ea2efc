// The settings beside the conversation, remembered for each model.

import { keepSettings, settings } from "./store.js";
import { byId } from "./ui.js";

const form = byId("knobs");
const slider = byId("slider");
const { temperature } = form.elements;
let model = null;

const name = () => model.of ?? model.name; // checkpoints share those of their run
const kind = () => (model.chat ? "chat" : "text");

export function use(next) {
  model = next;
  fill();
}

function fill() {
  const values = settings(name(), kind());
  for (const field of form.elements) {
    if (field.type === "checkbox") field.checked = Boolean(values[field.name]);
    else if (field.name) field.value = values[field.name] ?? "";
  }
  byId("system-field").hidden = kind() !== "chat";
  slider.value = temperature.value;
}

function values() {
  const found = {};
  for (const field of form.elements) {
    if (!field.name) continue;
    if (field.type === "checkbox") found[field.name] = field.checked;
    else found[field.name] = field.type === "number" ? (field.value === "" ? null : Number(field.value)) : field.value;
  }
  return found;
}

// What a request takes: {numbers, system}; null where a field is wrong, which is then shown by `reveal`.
export function chosen(reveal) {
  if (!form.checkValidity()) {
    reveal();
    form.reportValidity();
    return null;
  }
  const { system, think: _, ...numbers } = values(); // how a reply is looked at is no matter of the request
  if (numbers.max_tokens !== null) numbers.min_tokens = Math.min(numbers.min_tokens ?? 0, numbers.max_tokens);
  return { system: kind() === "chat" ? system.trim() : "", numbers };
}

export const isThinking = () => form.elements.think.checked;

slider.addEventListener("input", () => {
  temperature.value = slider.value;
});
temperature.addEventListener("input", () => {
  slider.value = temperature.value;
});
form.addEventListener("input", () => {
  if (model && form.checkValidity()) keepSettings(name(), kind(), values());
});
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", (event) => {
  event.preventDefault();
  keepSettings(name(), kind(), {});
  fill();
});
