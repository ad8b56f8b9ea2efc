// Asking a run what it knows by now: a checkpoint by the slider, or whichever is the newest, and its answers.

import * as api from "./api.js";
import { collector, painter } from "./tokens.js";
import { byId, make } from "./ui.js";

const slider = byId("checkpoint");
const box = byId("text");
const MOST_ANSWERS = 30;
let run = null; // what the server last said of the run
let chosen = null; // the step of the slider; null is the newest, whichever that is
let asked = null; // the last question, to ask it again
let writing = null; // what stops the answer that is being written

export const isAsking = () => writing !== null;
const kept = () => run?.checkpoints ?? [];
const name = () => `${run.name}@${chosen ?? "newest"}`;

// Takes note of what the run has by now.
export function know(next) {
  const before = run?.name === next.name ? newest(run) : undefined;
  if (run && run.name !== next.name) forget();
  run = next;
  const isGone = chosen !== null && !kept().some(({ step }) => step === chosen);
  if (isGone) chosen = null;
  dress(isGone ? "The one chosen was removed; this is the newest: " : "");
  if (before !== undefined && before !== newest(run) && byId("again").checked && asked && !writing) ask(asked);
}

const newest = ({ checkpoints }) => checkpoints.at(-1)?.step;

function forget() {
  writing?.abort();
  chosen = asked = null;
  byId("answers").replaceChildren();
}

function dress(before = "") {
  const all = kept();
  const at = chosen === null ? all.length - 1 : all.findIndex(({ step }) => step === chosen);
  slider.max = String(Math.max(0, all.length - 1));
  slider.value = String(Math.max(0, at));
  slider.disabled = all.length < 2;
  const words = all.length ? before + said(all[at]) : "There is none yet: it comes with the first save.";
  byId("which").textContent = words;
  slider.setAttribute("aria-valuetext", words);
  box.disabled = byId("send").disabled = !all.length;
  box.placeholder = run.chat ? "Say something" : "Begin a text";
  byId("talk-with").hidden = !all.length;
  byId("talk-with").href = `./?${new URLSearchParams({ model: all.length ? name() : "" })}`;
  byId("side-by-side").hidden = chosen === null;
  byId("side-by-side").href = `./?${new URLSearchParams({ model: name(), rival: `${run.name}@newest` })}`;
}

function said({ step, loss }) {
  const marks = [chosen === null ? "the newest" : "", step === run.served ? "the best" : ""].filter(Boolean).join(", ");
  return [`step ${step.toLocaleString("en")}`, Number.isFinite(loss) ? `loss ${loss.toFixed(3)}` : "", marks].filter(Boolean).join(" · ");
}

async function ask(question) {
  asked = question;
  const ends = (writing = new AbortController());
  const answer = begun(question);
  busy(true);
  try {
    for await (const part of api.reply(...request(question), ends.signal)) answer.take(part);
    answer.end();
  } catch (error) {
    answer.end(error.name === "AbortError" ? "stopped" : error.message);
  }
  if (writing === ends) writing = null;
  busy(writing !== null);
}

function request({ text, temperature, most, seed }) {
  const numbers = { model: name(), temperature, max_tokens: most, seed, min_tokens: Math.min(run.chat ? 5 : 10, most) };
  if (run.chat) return ["v1/chat/completions", { ...numbers, messages: [{ role: "user", content: text }] }];
  return ["v1/completions", { ...numbers, prompt: text, truncate: true }];
}

// An answer on the page, which grows.
function begun({ text }) {
  const head = make("p", "answer-head", "…");
  const words = make("p", "words", run.chat ? null : make("span", "given", text));
  const written = words.appendChild(make("span", "writing"));
  byId("answers").prepend(make("li", "", head, run.chat ? make("p", "given", text) : null, words));
  while (byId("answers").children.length > MOST_ANSWERS) byId("answers").lastChild.remove();
  const thoughts = collector();
  const paint = painter(null);
  const isThought = byId("think").checked;
  return {
    take({ start, tokens, text: more }) {
      if (start) head.textContent = `step ${start.step.toLocaleString("en")} · seed ${start.seed}`;
      if (tokens) thoughts.take(tokens);
      if (tokens && isThought) written.append(...paint(thoughts.tokens));
      else if (more && !(isThought && thoughts.tokens.length)) written.append(more);
    },
    end(problem = "") {
      written.classList.remove("writing");
      if (problem) head.textContent = `${head.textContent} · ${problem}`;
      byId("said").textContent = `${head.textContent}: ${words.textContent}`;
    },
  };
}

function busy(isBusy) {
  byId("send").hidden = isBusy;
  byId("stop").hidden = !isBusy;
}

export function asking() {
  slider.addEventListener("input", () => {
    const at = kept()[Number(slider.value)];
    chosen = at === kept().at(-1) ? null : at.step;
    dress();
  });
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const [temperature, most, seed] = ["temperature", "most", "seed"].map((id) => (byId(id).value === "" ? null : Number(byId(id).value)));
    if (!writing && (box.value.trim() || !run?.chat)) ask({ text: box.value, temperature, most, seed });
  });
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    byId("ask").requestSubmit();
  });
  byId("stop").addEventListener("click", () => writing?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.defaultPrevented) writing?.abort();
  });
}
