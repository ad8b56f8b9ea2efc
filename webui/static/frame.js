// What is around the conversation: drawers on a narrow screen, light and dark, the box that grows with its text, the key.

import { recall, remember } from "./store.js";

const byId = (id) => document.getElementById(id);

export function frame() {
  drawer("history", "show-history");
  drawer("settings", "show-settings");
  for (const node of document.querySelectorAll("[data-close]")) node.addEventListener("click", closeDrawers);
  theme();
  byId("text").addEventListener("input", grow);
}

function drawer(id, opener) {
  byId(opener).addEventListener("click", () => {
    byId(id).classList.add("open");
    byId(id).querySelector("[data-close]").focus();
  });
  byId(id).addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !byId(id).classList.contains("open")) return;
    closeDrawers();
    byId(opener).focus();
  });
}

export function closeDrawers() {
  for (const node of document.querySelectorAll(".side.open")) node.classList.remove("open");
}

function theme() {
  const dark = byId("dark");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (dark.media === "all" ? true : dark.media === "not all" ? false : system.matches);
  const label = () => {
    byId("theme").textContent = isDark() ? "Light" : "Dark";
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
  dialog.showModal();
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
