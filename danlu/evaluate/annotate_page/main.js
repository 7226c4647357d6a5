// One item at a time: shown, answered by a key or a button, kept by the server, and the next one.

import { byId, el } from "/shared/dom.js";
import { makeTexts } from "/shared/i18n.js";
import { keep, recall } from "/shared/kept.js";
import { isDark, setDark } from "/shared/theme.js";
import { TEXTS } from "/static/texts.js";

const i18n = makeTexts(TEXTS);
const t = i18n.t;
const RATER = "danlu.rater";
let study = null;
let rater = "";
let current = null;
let since = 0;
let busy = false;
let ssa = {};

async function ask(path, body) {
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const answer = await fetch(path, options || {});
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error.message);
  return found;
}

function talk(value) {
  if (typeof value === "string") return value;
  return value.map((turn) => el("p", { class: "turn" }, el("b", {}, turn.role), turn.content));
}

function box(title, value) {
  return el("section", { class: "text" }, el("h3", {}, title), talk(value));
}

function draw() {
  i18n.apply();
  byId("language").textContent = t("language");
  byId("theme").textContent = t(isDark() ? "light" : "dark");
  byId("who").hidden = Boolean(rater);
  const item = current && current.item !== null;
  byId("task").hidden = !item;
  byId("finished").hidden = !current || item;
  byId("undo").hidden = !current || current.done === 0;
  byId("progress").textContent = current ? t("progress", current) : "";
  if (item) drawItem(current.row);
  else if (current) drawResult();
}

function drawItem(row) {
  byId("guideline").textContent = study.guideline;
  byId("guideline").hidden = !study.guideline;
  byId("question").textContent = study.question || t(study.kind);
  const sides = () => el("div", { class: "sides" }, box(t("left"), row.a), box(t("right"), row.b));
  const shown = {
    label: () => [el("div", { class: "text" }, row.text)],
    pair: () => [box(t("prompt"), row.prompt), sides()],
    acute: () => [sides()],
    ssa: () => [box(t("context"), row.context), box(t("ssa"), row.response)],
  };
  byId("shown").replaceChildren(...shown[study.kind]());
  byId("choices").replaceChildren(...(study.kind === "ssa" ? questions() : choices().map(button)));
  byId("keys").textContent = t(study.kind === "label" ? "keysLabel" : study.kind === "ssa" ? "keysSsa" : "keysPair");
}

function choices() {
  if (study.kind === "label") return study.labels.map((label, number) => ({ value: label, text: label, key: String(number + 1) }));
  return [
    { value: "a", text: t("a"), key: "1" },
    { value: "tie", text: t("tie"), key: "0" },
    { value: "b", text: t("b"), key: "2" },
  ];
}

function button({ value, text, key }) {
  return el("button", { type: "button", onclick: () => answer(value) }, el("kbd", { "aria-hidden": "true" }, key), " ", text);
}

/** The two questions about a reply, one after the other: a reply that makes no sense is not specific either. */
function questions() {
  return ["sensible", "specific"].map((name) =>
    el("fieldset", { disabled: name === "specific" && !("sensible" in ssa) }, el("legend", {}, t(name)),
      [true, false].map((value) =>
        el("button", { type: "button", "aria-pressed": String(ssa[name] === value), onclick: () => say(name, value) }, t(value ? "yes" : "no")))));
}

function say(name, value) {
  ssa[name] = value;
  if (name === "sensible" && !value) ssa.specific = false;
  if ("specific" in ssa) answer({ sensible: ssa.sensible, specific: ssa.specific });
  else drawItem(current.row);
}

async function step(work) {
  if (busy) return;
  busy = true;
  try {
    current = await work();
    byId("notice").textContent = "";
    ssa = {};
    since = performance.now();
    draw();
    if (current.item !== null) byId("task").focus();
  } catch (error) {
    byId("notice").textContent = t("failed", { why: error.message });
  } finally {
    busy = false;
  }
}

function answer(value) {
  const seconds = (performance.now() - since) / 1000;
  return step(() => ask("/api/answer", { rater, item: current.item, value, seconds }));
}

async function drawResult() {
  const found = await ask("/api/result");
  const named = ["krippendorff_alpha", "fleiss_kappa", "cohen_kappa", "items_with_several"];
  const agreement = found.agreement || found.agreement_sensible || {};
  const rows = [["answers", found.answers], ["raters", found.raters], ...named.map((name) => [name, agreement[name]])];
  byId("result").replaceChildren(
    ...rows.filter(([, value]) => typeof value === "number")
      .flatMap(([name, value]) => [el("dt", {}, t(name)), el("dd", {}, i18n.number(value, Number.isInteger(value) ? 0 : 3))]));
}

function begin(name) {
  rater = name.trim();
  if (!rater) return;
  keep(RATER, rater);
  step(() => ask(`/api/next?rater=${encodeURIComponent(rater)}`));
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
  const key = event.key.toLowerCase();
  if (key === "u" && current && current.done > 0) return void step(() => ask("/api/undo", { rater }));
  if (!current || current.item === null) return;
  if (study.kind === "ssa") {
    if (key === "y" || key === "n") say("sensible" in ssa ? "specific" : "sensible", key === "y");
    return;
  }
  const arrows = study.kind === "label" ? {} : { arrowleft: "a", arrowright: "b", arrowdown: "tie" };
  const chosen = arrows[key] ?? choices().find((choice) => choice.key === key)?.value;
  if (chosen === undefined) return;
  event.preventDefault();
  answer(chosen);
});
byId("who").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(byId("rater").value);
});
byId("undo").addEventListener("click", () => step(() => ask("/api/undo", { rater })));
byId("theme").addEventListener("click", () => { setDark(!isDark()); draw(); });
byId("language").addEventListener("click", () => { i18n.language = i18n.language === "en" ? "zh" : "en"; draw(); });

byId("rater").value = recall(RATER, "");
study = await ask("/api/study");
draw();
byId("rater").focus();
