// Dark or light theme: that of the system, until the user chooses one.

import { byId } from "./dom.js";
import { store, stored } from "./storage.js";

const SLOT = "iddpm.theme";
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");

/** Set up the button, and restore the theme chosen before. */
export function installTheme() {
  const kept = stored(SLOT, "localStorage");
  if (kept) root.dataset.theme = kept;
  const button = byId("theme");
  const current = () => root.dataset.theme ?? (system.matches ? "dark" : "light");
  const name = () => (button.textContent = current() === "dark" ? "Light" : "Dark");
  button.addEventListener("click", () => {
    root.dataset.theme = current() === "dark" ? "light" : "dark";
    store(SLOT, root.dataset.theme, "localStorage");
    name();
  });
  system.addEventListener("change", name);
  name();
}
