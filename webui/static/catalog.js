// Which models there are: those that are served by name, and of each run its checkpoints (NAME@STEP, NAME@newest).

import * as api from "./api.js";

let models = [];

export async function refresh() {
  models = await api.models();
}

export const all = () => models;
export const first = () => models.find((m) => m.chat) ?? models[0];
export const ofKind = (isChat) => models.find((m) => m.chat === isChat);

export function named(name) {
  return models.find((m) => m.name === name) ?? models.flatMap(checkpoints).find((m) => m.name === name);
}

// Models of their own, the newest first; none where the only one is what the run is served with.
export function checkpoints(model) {
  const kept = model.checkpoints ?? [];
  if (!kept.length || (kept.length === 1 && kept[0].step === model.step)) return [];
  const rows = kept.map((at) => ({ ...model, ...at, of: model.name, checkpoints: [] })).reverse();
  const newest = kept.reduce((a, b) => (b.saved >= a.saved ? b : a));
  return [{ ...model, ...newest, name: `${model.name}@newest`, of: model.name, checkpoints: [] }, ...rows];
}
