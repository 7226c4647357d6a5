// An answer as formatted text. The server makes safe HTML of it; nothing else is ever put in as HTML.

import { copy, el } from "/shared/dom.js";
import { announce } from "./announce.js";
import * as api from "./api.js";
import { icon } from "./icons.js";
import { t } from "./texts.js";

const MOST_CHARACTERS = 500_000; // as the server has it
const known = new Map();

async function html(text) {
  if (!known.has(text)) {
    const found = await api.markdown(text);
    if (known.size > 300) known.delete(known.keys().next().value);
    known.set(text, found);
  }
  return known.get(text);
}

/** A part of the page that follows a text which grows. */
export class Formatted {
  constructor() {
    this.element = el("div", { class: "formatted plain" });
    this.text = this.drawn = "";
    this.whole = false;
    this.blocks = []; // their HTML as it came
    this.tail = document.createTextNode(""); // what came since, as it is
    this.element.append(this.tail);
    this.running = null;
  }

  /** `whole`: nothing more will come. The promise is kept once all of it is shown. */
  show(text, whole) {
    this.text = text;
    this.whole = whole;
    this.tail.data = text.slice(this.drawn.length);
    if (text !== this.drawn) this.running ??= this.run().finally(() => (this.running = null));
    return this.running ?? Promise.resolve();
  }

  async run() {
    while (this.text !== this.drawn && this.text.length <= MOST_CHARACTERS) {
      const begin = performance.now();
      const text = this.text;
      try {
        this.put(await html(text), text);
      } catch {
        // It can be read all the same, as plain text.
        await sleep(1000);
        return;
      }
      const pause = Math.max(150, 4 * (performance.now() - begin));
      for (const until = performance.now() + pause; !this.whole && performance.now() < until; ) await sleep(50);
    }
  }

  put(found, text) {
    const template = document.createElement("template");
    template.innerHTML = found; // the only place
    const fresh = [...template.content.children];
    const sources = fresh.map((block) => block.outerHTML);
    this.tail.remove();
    if (this.drawn === "") this.element.replaceChildren();
    // What has not changed stays, with its focus and selection.
    let same = 0;
    while (same < sources.length && sources[same] === this.blocks[same]) same++;
    [...this.element.children].slice(same).forEach((block) => block.remove());
    fresh.slice(same).forEach((block) => this.element.append(finish(block)));
    this.blocks = sources;
    this.drawn = text;
    this.element.classList.remove("plain");
    this.tail.data = this.text.slice(text.length);
    this.tailPlace().append(this.tail);
  }

  /** Where a text goes on: in the last paragraph, item or line of code. */
  tailPlace() {
    let place = this.element;
    while (place.lastElementChild?.matches("p, ul, ol, li, blockquote, .code, pre, pre > code")) place = place.lastElementChild;
    return place;
  }
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Links open beside the page; code and tables get what they need around them. */
function finish(block) {
  const within = (selector) => [...(block.matches(selector) ? [block] : []), ...block.querySelectorAll(selector)];
  for (const link of within("a")) link.target = "_blank";
  for (const code of within("div.code")) code.prepend(codeHead(code));
  for (const cell of within("th")) cell.setAttribute("scope", "col");
  if (!block.matches("table")) return block;
  return el("div", { class: "wide", tabindex: "0", role: "group", "aria-label": t("table") }, block);
}

/** Copies what `text` gives, and says for a moment whether that went well. */
export function copyButton(name, text) {
  const label = el("span", {}, t(name));
  const button = el("button", { type: "button", class: "bare" }, icon("copy"), label);
  button.addEventListener("click", async () => {
    const said = t((await copy(text())) ? "copied" : "notCopied");
    label.textContent = said;
    announce(said);
    setTimeout(() => (label.textContent = t(name)), 2000);
  });
  return button;
}

function codeHead(code) {
  const pre = code.querySelector("pre");
  const language = code.dataset.language;
  pre.setAttribute("role", "group");
  pre.setAttribute("aria-label", language ? t("codeIn", { language }) : t("code"));
  const button = copyButton("copyCode", () => pre.textContent.replace(/\n$/, ""));
  return el("div", { class: "head" }, el("span", {}, language || t("code")), button);
}
