// Texts in English and Chinese: what the browser prefers, or what was chosen last.

import { keep, recall } from "./kept.js";

const KEY = "danlu.language";
const TAGS = { en: "en", zh: "zh-CN" };
const ATTRIBUTES = { t: null, tLabel: "aria-label", tTitle: "title", tPlaceholder: "placeholder" };

/** `texts`: {en: {name: text}, zh: {…}}; {word} in a text is filled in. */
export function makeTexts(texts) {
  let language = recall(KEY);
  if (!(language in TAGS)) language = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";

  function t(name, values = {}) {
    const text = texts[language][name];
    if (text === undefined) throw new Error(`no text is called ${name}`);
    return text.replace(/\{(\w+)\}/g, (whole, key) => (key in values ? String(values[key]) : whole));
  }

  /** Fills in every element below `root` that has data-t, data-t-label, data-t-title or data-t-placeholder. */
  function apply(root = document) {
    document.documentElement.lang = TAGS[language];
    for (const [key, attribute] of Object.entries(ATTRIBUTES)) {
      const selector = `[data-${key.replace(/[A-Z]/g, (letter) => "-" + letter.toLowerCase())}]`;
      for (const element of root.querySelectorAll(selector)) {
        const text = t(element.dataset[key]);
        if (attribute) element.setAttribute(attribute, text);
        else element.textContent = text;
      }
    }
  }

  return {
    t,
    apply,
    get language() {
      return language;
    },
    set language(name) {
      language = name;
      keep(KEY, name);
      apply();
    },
    number: (value, digits = 0) =>
      value.toLocaleString(TAGS[language], { minimumFractionDigits: digits, maximumFractionDigits: digits }),
  };
}
