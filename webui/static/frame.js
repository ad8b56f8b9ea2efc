// What is around the conversation: side panels, light and dark, the box that grows with its text, the key.

import { recall, remember } from "./store.js";
import { byId, relabel } from "./ui.js";

const wide = matchMedia("(min-width: 72.01rem)");

export function frame() {
  opens("history", "show-history");
  opens("settings", "show-settings");
  for (const node of document.querySelectorAll("[data-close]")) node.addEventListener("click", closeDrawers);
  document.body.classList.toggle("no-settings", recall("settings-closed") === true);
  theme();
  byId("text").addEventListener("input", grow);
}

function opens(id, opener) {
  byId(opener).addEventListener("click", () => {
    if (id === "settings" && wide.matches) return fold();
    return slideIn(id);
  });
  byId(id).addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || !byId(id).classList.contains("open")) return;
    event.preventDefault();
    closeDrawers();
  });
}

// A drawer over the page, which is out of reach meanwhile.
export function slideIn(id) {
  byId(id).classList.add("open");
  byId(`show-${id}`).setAttribute("aria-expanded", "true");
  byId(id).querySelector("[data-close]").focus();
  byId("main").inert = getComputedStyle(byId("veil")).display !== "none";
}

// On a wide screen the settings stand beside the conversation, unless they were put away.
function fold() {
  const isClosed = document.body.classList.toggle("no-settings");
  remember("settings-closed", isClosed);
}

export function showSettings() {
  document.body.classList.remove("no-settings");
  if (!wide.matches) slideIn("settings");
}

export function closeDrawers() {
  byId("main").inert = false;
  for (const node of document.querySelectorAll(".side.open")) {
    const opener = byId(`show-${node.id}`);
    const isInside = node.contains(document.activeElement);
    node.classList.remove("open");
    opener.setAttribute("aria-expanded", "false");
    if (isInside) opener.focus();
  }
}

export function theme() {
  const dark = byId("dark");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (dark.media === "all" ? true : dark.media === "not all" ? false : system.matches);
  const label = () => {
    byId("theme").querySelector("use").setAttribute("href", isDark() ? "#i-sun" : "#i-moon");
    relabel(byId("theme"), isDark() ? "Light" : "Dark");
  };
  byId("theme").addEventListener("click", () => {
    const next = isDark() ? "light" : "dark";
    dark.media = next === "dark" ? "all" : "not all";
    try {
      localStorage.setItem("fnlm.theme", next);
    } catch {
      // it holds until the page closes
    }
    label();
  });
  system.addEventListener("change", label);
  label();
}

export function grow() {
  const box = byId("text");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight}px`;
}

// Ask for the API key; resolves when one was given.
export function askKey() {
  const dialog = byId("key-dialog");
  byId("key").value = recall("key") ?? "";
  if (!dialog.open) dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        remember("key", byId("key").value.trim());
        resolve();
      },
      { once: true },
    );
  });
}
