// How answers are sampled: the fields, their values, and what is sent of them.

import { byId, el } from "/shared/dom.js";
import { keep, recall } from "/shared/kept.js";
import { number, t } from "./texts.js";

const KEY = "danlu.settings";
const LARGEST = 2 ** 31 - 1;

const FIELDS = [
  { key: "temperature", min: 0, max: 2, step: 0.1, default: 0.7 },
  { key: "top_p", min: 0.01, max: 1, step: 0.01, default: 0.95 },
  { key: "top_k", min: 0, max: 1000, step: 1, default: 0, whole: true },
  { key: "min_p", min: 0, max: 1, step: 0.01, default: 0 },
  { key: "repetition_penalty", min: 0.1, max: 10, step: 0.05, default: 1 },
  { key: "max_tokens", min: 1, max: 1_000_000, step: 1, default: null, whole: true, hint: "empty" },
  { key: "seed", min: 0, max: LARGEST, step: 1, default: null, whole: true, hint: "random" },
];

const defaults = () => ({ ...Object.fromEntries(FIELDS.map((field) => [field.key, field.default])), stop: [] });

/** model, second: names; first, other: sampling of each; own: whether the second has its own. */
export const settings = { model: null, second: null, own: false, first: defaults(), other: defaults(), ...stored() };

/** What was kept, as far as it is in order. */
function stored() {
  let found;
  try {
    found = JSON.parse(recall(KEY, "{}")) ?? {};
  } catch {
    return {};
  }
  const text = (value) => (typeof value === "string" ? value : null);
  return { model: text(found.model), second: text(found.second), own: found.own === true, first: sound(found.first), other: sound(found.other) };
}

function sound(values) {
  const found = defaults();
  for (const field of FIELDS) if (values && isRight(field, values[field.key])) found[field.key] = values[field.key];
  if (Array.isArray(values?.stop)) found.stop = values.stop.filter((one) => typeof one === "string" && one).slice(0, 16);
  return found;
}

function isRight(field, value) {
  if (value === null) return field.default === null;
  return Number.isFinite(value) && value >= field.min && value <= field.max && (!field.whole || Number.isInteger(value));
}

export function keepSettings() {
  keep(KEY, JSON.stringify(settings));
}

/** The part of a request that is about sampling. What changes nothing is not sent. */
export function request(values) {
  const idle = { top_k: 0, min_p: 0, repetition_penalty: 1, max_tokens: null, seed: null };
  const sent = Object.entries(values).filter(([key, value]) => key !== "stop" && !(key in idle && idle[key] === value));
  return { ...Object.fromEntries(sent), ...(values.stop.length ? { stop: values.stop } : {}) };
}

/** Draws the fields: of the first model, and of the second where it has its own. */
export function drawFields() {
  const compares = settings.second !== null;
  const both = compares && settings.own;
  const own = el("input", { type: "checkbox", id: "own", checked: settings.own });
  own.addEventListener("change", () => {
    settings.own = own.checked;
    keepSettings();
    drawFields();
    byId("own").focus();
  });
  byId("sampling").replaceChildren(
    group(t(both ? "samplingFirst" : "sampling"), "first", settings.first),
    ...(compares ? [el("p", {}, el("label", { class: "check" }, own, t("ownSampling")))] : []),
    ...(both ? [group(t("samplingSecond"), "other", settings.other)] : []),
  );
}

export function reset() {
  settings.first = defaults();
  settings.other = defaults();
  settings.own = false;
  keepSettings();
  drawFields();
}

function group(title, prefix, values) {
  return el("fieldset", {}, el("legend", {}, title), FIELDS.map((field) => numberField(field, prefix, values)), stopField(prefix, values));
}

const faultOf = (id) => el("p", { class: "help bad", id: `${id}-fault`, role: "status" });

function frame(id, name, help, input, fault) {
  input.setAttribute("aria-describedby", `${id}-fault ${id}-help`);
  return el(
    "div",
    { class: "field" },
    el("label", { for: id }, name),
    input,
    fault,
    el("p", { class: "help", id: `${id}-help` }, help),
  );
}

function numberField(field, prefix, values) {
  const id = `${prefix}-${field.key}`;
  const { min, max, step } = field;
  const input = el("input", { id, type: "number", min, max, step, inputmode: field.whole ? "numeric" : "decimal" });
  if (field.hint) input.placeholder = t(field.hint);
  input.value = values[field.key] ?? "";
  const fault = faultOf(id);
  input.addEventListener("input", () => {
    const value = input.value === "" && !input.validity.badInput ? null : input.valueAsNumber;
    const right = isRight(field, value);
    input.setAttribute("aria-invalid", String(!right));
    fault.textContent = right ? "" : t(field.whole ? "wholeBetween" : "between", { min: number(min, min % 1 ? 2 : 0), max: number(max) });
    if (!right) return;
    values[field.key] = value;
    keepSettings();
  });
  return frame(id, t(field.key), t(`${field.key}Help`), input, fault);
}

function stopField(prefix, values) {
  const id = `${prefix}-stop`;
  const input = el("textarea", { id, rows: "2" });
  input.value = values.stop.join("\n");
  const fault = faultOf(id);
  input.addEventListener("input", () => {
    const lines = input.value.split("\n").filter((line) => line !== "");
    const right = lines.length <= 16;
    input.setAttribute("aria-invalid", String(!right));
    fault.textContent = right ? "" : t("tooManyStops");
    if (!right) return;
    values.stop = lines;
    keepSettings();
  });
  return frame(id, t("stopTexts"), t("stopTextsHelp"), input, fault);
}
