// The conversation on the page. What a model wrote is only ever put into text nodes.

const scroll = document.getElementById("scroll");
const log = document.getElementById("log");
const down = document.getElementById("down");
const NEAR = 48; // pixels from the end that still count as being there

export function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

export function button(label, action, className = "quiet") {
  const node = make("button", className, label);
  node.type = "button";
  node.addEventListener("click", action);
  return node;
}

const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;

export function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  down.hidden = true;
}

// Change the page, and stay at the end only where the reader was there.
function following(change) {
  const follow = atEnd();
  change();
  if (follow) toEnd();
  else down.hidden = false;
}

scroll.addEventListener("scroll", () => { down.hidden = atEnd(); }, { passive: true });
down.addEventListener("click", toEnd);

// All turns anew. A plain model's prompt and what it wrote are one text.
export function show(talk, actions) {
  log.replaceChildren();
  talk.messages.forEach((message, i) => {
    if (message.role === "user") addPrompt(message.content, talk.kind);
    else {
      const turn = addReply(talk.kind);
      turn.add(message.content);
      turn.finish(message, actions(i));
    }
  });
  toEnd();
}

export function addPrompt(content, kind) {
  const turn = make("div", `turn ${kind === "text" ? "text" : "user"}`);
  const words = make("p", "words");
  if (kind !== "text") words.append(make("span", "unseen", "You: "));
  words.append(make("span", "prompt", content));
  turn.append(words);
  log.append(turn);
  toEnd();
}

// A reply that grows: `add` text, `note` what is to know, `finish` with what can be done with it.
export function addReply(kind) {
  const joined = kind === "text" && log.lastElementChild?.classList.contains("text");
  const turn = joined ? log.lastElementChild : make("div", "turn reply");
  const words = joined ? turn.querySelector(".words") : make("p", "words");
  const text = document.createTextNode("");
  if (!joined) words.append(make("span", "unseen", "Model: "));
  words.append(text);
  if (!joined) turn.append(words);
  words.classList.add("writing");
  log.append(turn);
  toEnd();

  let waiting = "";
  let frame = 0;
  const paint = () => {
    frame = 0;
    const more = waiting;
    waiting = "";
    following(() => text.appendData(more));
  };
  return {
    add(more) {
      waiting += more;
      frame ||= requestAnimationFrame(paint);
    },
    note(line) {
      following(() => turn.prepend(make("p", "note", line)));
    },
    finish(message, buttons) {
      if (frame) cancelAnimationFrame(frame);
      paint();
      words.classList.remove("writing");
      const line = described(message);
      following(() => {
        if (message.error) {
          const note = make("p", "note bad", message.error);
          note.setAttribute("role", "alert");
          turn.append(note);
        }
        const tools = make("div", "tools");
        tools.append(...buttons);
        if (line) tools.append(make("span", "figures", line));
        turn.append(tools);
      });
    },
  };
}

// Takes the last reply off the page, for another in its place.
export function dropLast(kind) {
  const turn = log.lastElementChild;
  if (kind === "text") {
    turn.querySelectorAll(".tools, .note").forEach((node) => node.remove());
    turn.querySelector(".words").lastChild.remove();
  } else turn.remove();
}

export function clearTools() {
  log.querySelectorAll(".tools .last").forEach((node) => node.remove());
}

function described({ finish, meta }) {
  const ends = { stopped: "stopped", length: "cut off at the most tokens" };
  const speed = meta?.tokens && meta.seconds ? `${meta.tokens} tokens, ${Math.round(meta.tokens / meta.seconds)} a second` : "";
  const seed = meta?.seed !== undefined ? `seed ${meta.seed}` : "";
  return [ends[finish], speed, seed].filter(Boolean).join(" · ");
}

// The list of kept conversations.
export function showList(list, current, open, remove) {
  const rows = list.map((talk) => {
    const row = make("li", talk.id === current ? "current" : "");
    const title = button(talk.title || "Untitled", () => open(talk), "title");
    title.title = talk.title;
    if (talk.id === current) title.setAttribute("aria-current", "true");
    const cross = button("×", () => remove(talk), "delete");
    cross.setAttribute("aria-label", `Delete ${talk.title || "conversation"}`);
    row.append(title, cross);
    return row;
  });
  document.getElementById("conversations").replaceChildren(...rows);
  document.getElementById("clear").hidden = list.length === 0;
}
