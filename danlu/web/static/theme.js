// Light or dark: as the system has it, or as it was chosen last.

import { keep, recall } from "./kept.js";

const KEY = "danlu.theme";
const chosen = recall(KEY);
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;

export function isDark() {
  const theme = document.documentElement.dataset.theme;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

export function setDark(dark) {
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  keep(KEY, dark ? "dark" : "light");
}
