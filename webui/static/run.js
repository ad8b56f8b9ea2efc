// The page of a run: asked for again every few seconds while it is seen; only what is new comes.

import * as api from "./api.js";
import { asking, know } from "./ask.js";
import { drawCharts } from "./charts.js";
import { askKey, grow, theme } from "./frame.js";
import { byId, make } from "./ui.js";

const SOON = 2000; // ms, while it trains
const LATER = 15_000;
const PARTED = /\n-{40}\n/; // between two samples
let name = new URLSearchParams(location.search).get("name");
let known = {}; // what was last said of it, by which only what changed is drawn
let timer = 0;
let turn = 0; // of which answers are still wanted

const number = (n) => (n === null ? "–" : n.toLocaleString("en"));

async function tick() {
  clearTimeout(timer);
  const mine = ++turn;
  let wait = SOON;
  let all = [];
  try {
    all = await api.runs();
    if (mine !== turn) return;
    name ??= all[0] ?? null;
    choices(all);
    if (name === null) throw new Error("There is no run in the served folders.");
    const run = await api.run(name, known.name === name ? known.version : "");
    if (mine !== turn) return;
    show(run);
    notify("");
    wait = run.state === "running" || run.state === "not begun" ? SOON : LATER;
  } catch (error) {
    if (mine !== turn) return;
    if (error.status === 401) {
      await askKey();
      return void tick();
    }
    if (error.status === 404) byId("whole").hidden = true;
    notify(error.status === 404 ? `There is no run ${name}${all.length ? "; choose another above" : ""}.` : error.message);
  }
  if (!document.hidden) timer = setTimeout(tick, wait);
}

function notify(line) {
  byId("notice").textContent = line;
  byId("notice").hidden = !line;
}

function choices(all) {
  const box = byId("runs");
  box.hidden = all.every((each) => each === name);
  byId("run-name").classList.toggle("unseen", !box.hidden);
  if (!box.hidden && box.dataset.all !== JSON.stringify(all)) {
    box.dataset.all = JSON.stringify(all);
    box.replaceChildren(...all.map((each) => new Option(each, each)));
  }
  box.value = name;
}

function show(run) {
  const isOther = known.name !== run.name;
  if (byId("whole").hidden) {
    byId("whole").hidden = false;
    grow();
  }
  byId("run-name").textContent = run.name;
  document.title = `${run.name}, ${run.state} - fnlm`;
  progress(run);
  if (run.charts !== undefined) charts(run.charts);
  if (changed("figures", run)) {
    byId("figures").replaceChildren(...run.figures.map(([what, value]) => make("div", "", make("dt", "", what), make("dd", "", value))));
  }
  if (changed("events", run)) events(run.events);
  if (isOther || changed("samples", run)) samples(run.samples, isOther);
  know(run);
  known = run;
}

const changed = (key, run) => JSON.stringify(known[key]) !== JSON.stringify(run[key]);

function progress(run) {
  const { state, step, steps, left, silent } = run;
  byId("state").textContent = state;
  byId("state").dataset.state = state;
  byId("progress").max = steps || 1;
  byId("progress").value = Math.min(step ?? 0, steps || 1);
  byId("where").textContent = `step ${number(step ?? 0)}${steps ? ` of ${number(steps)}` : ""}${left ? ` · ${left} left` : ""}`;
  const torn = run.unreadable ? ` · ${run.unreadable} lines of metrics.jsonl cannot be read` : "";
  byId("when").textContent = (silent === null ? "" : `last line ${ago(silent)} ago`) + torn;
}

function ago(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 129_600 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86_400)} days`;
}

function charts(html) {
  if (html) drawCharts(byId("charts"), html);
  else byId("charts").replaceChildren(make("p", "none", "Curves come with the first lines of metrics.jsonl."));
}

// The latest first.
function events(all) {
  byId("happened").hidden = !all.length;
  byId("events").replaceChildren(...all.toReversed().map(({ step, event, message, time }) => {
    const what = make("td", "", make("strong", "", event), message.startsWith(event) ? message.slice(event.length) : ` ${message}`);
    return make("tr", "", make("td", "", number(step)), what, make("td", "", time === null ? "–" : new Date(time * 1000).toLocaleTimeString()));
  }));
}

// Samples

const slider = byId("sample");

function samples(steps, isOther) {
  const wasLast = isOther || slider.value === slider.max;
  byId("samples").hidden = !steps.length;
  slider.max = String(Math.max(0, steps.length - 1));
  slider.disabled = steps.length < 2;
  if (wasLast) slider.value = slider.max;
  if (steps.length) sample(steps[Number(slider.value)]);
}

let shown = ""; // the sample asked for last

async function sample(at) {
  const step = `step ${number(Number(at))}`;
  byId("sample-step").textContent = step;
  slider.setAttribute("aria-valuetext", step);
  if (shown === `${at} ${name}`) return;
  shown = `${at} ${name}`;
  const mine = shown;
  const text = await api.sample(name, at).catch((error) => error.message);
  if (shown !== mine) return;
  byId("sample-text").replaceChildren(...text.trimEnd().split(PARTED).map((part) => {
    const [given, ...written] = part.split("⏵");
    if (!written.length) return make("p", "words", part);
    return make("p", "words", make("span", "given", given), written.join("⏵"));
  }));
}

slider.addEventListener("input", () => sample(known.samples[Number(slider.value)]));
byId("runs").addEventListener("change", () => {
  name = byId("runs").value;
  history.replaceState(null, "", `?${new URLSearchParams({ name })}`);
  tick();
});
document.addEventListener("visibilitychange", () => (document.hidden ? clearTimeout(timer) : tick()));
byId("text").addEventListener("input", grow);
addEventListener("resize", grow);
theme();
asking();
tick();
