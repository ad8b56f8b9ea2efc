// Conversations and settings, kept in this browser. What cannot be kept (storage off or full) lives until the page closes.

const kept = new Map();

function read(name, otherwise) {
  if (kept.has(name)) return kept.get(name);
  let value = null;
  try {
    value = JSON.parse(localStorage.getItem(`fnlm.${name}`));
  } catch {
    value = null;
  }
  kept.set(name, value ?? otherwise);
  return kept.get(name);
}

// Whether the browser keeps it.
function write(name, value) {
  kept.set(name, value);
  try {
    localStorage.setItem(`fnlm.${name}`, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const isTurn = (m) => m && ["user", "assistant"].includes(m.role) && typeof m.content === "string";
const isTalk = (c) => c && typeof c.id === "string" && Array.isArray(c.messages) && c.messages.every(isTurn);

export function conversations() {
  const list = read("conversations", []);
  return Array.isArray(list) ? list.filter(isTalk) : [];
}

export function begin(model, kind) {
  const id = `${Date.now().toString(36)}-${Math.random().toString(36).slice(2, 8)}`;
  return { id, model, kind, title: "", messages: [] };
}

// The newest first; one without messages is not kept.
export function keep(talk) {
  const others = conversations().filter((c) => c.id !== talk.id);
  talk.title ||= (talk.messages[0]?.content ?? "").trim().replace(/\s+/g, " ").slice(0, 60);
  return write("conversations", talk.messages.length ? [talk, ...others] : others);
}

export const forget = (id) => write("conversations", conversations().filter((c) => c.id !== id));
export const forgetAll = () => write("conversations", []);

// Chat models and plain ones have settings of their own.
const DEFAULTS = {
  chat: { temperature: 0.8, min_tokens: 5, max_tokens: null, top_k: null, top_p: null, seed: null, system: "" },
  text: { temperature: 0.8, min_tokens: 10, max_tokens: 200, top_k: null, top_p: null, seed: null },
};

export const settings = (kind) => ({ ...DEFAULTS[kind], ...read(`settings.${kind}`, {}) });
export const keepSettings = (kind, values) => write(`settings.${kind}`, values);

export const recall = (name) => read(name, null);
export const remember = write;
