// Loaded before the page is painted: the light or dark that was chosen here before, else the system's.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("fnlm.theme");
  } catch {
    // storage is off: the system's choice stands
  }
  const link = document.getElementById("dark");
  if (chosen) link.media = chosen === "dark" ? "all" : "not all";
})();
