// The tokens of an answer, coloured by how likely each was, with what else the model considered.

import { byId, el } from "/shared/dom.js";
import { number, t } from "./texts.js";

const STEPS = [0.9, 0.6, 0.3, 0.1, 0.02];

/** What is kept of a token that the API tells of. */
export function readToken({ token, logprob, bytes, top_logprobs: top }) {
  return { token, p: Math.exp(logprob), bytes, top: top.map((one) => ({ token: one.token, p: Math.exp(one.logprob) })) };
}

const step = (p) => STEPS.findIndex((least) => p >= least);
const classOf = (p) => `p${step(p) < 0 ? STEPS.length : step(p)}`;
const percent = (p) => (p < 0.001 ? `< ${number(0.1, 1)} %` : `${number(100 * p, p < 0.1 ? 1 : 0)} %`);

/** Blanks and line ends as signs, as they would not be seen. */
const visible = (token) => token.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/ /g, "␣");

export function tokenView(tokens) {
  const list = el("div", { class: "tokens", role: "listbox", "aria-label": t("tokenView"), "aria-orientation": "horizontal" });
  const decoder = new TextDecoder();
  tokens.forEach((token, index) => {
    // A character may be made of several tokens; it is shown at the last of them.
    const text = token.bytes ? decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.token;
    const shown = (text || "⋯").replace(/\n/g, "↵\n");
    list.append(
      el(
        "span",
        {
          role: "option",
          class: classOf(token.p),
          tabindex: index === 0 ? "0" : "-1",
          "aria-selected": "false",
          "aria-label": t("tokenName", { token: text ? visible(text) : t("partOfCharacter"), percent: percent(token.p) }),
        },
        shown,
      ),
    );
  });
  const show = (event) => {
    const one = event.target.closest("[role=option]");
    if (one) showTip(one, tokens[[...list.children].indexOf(one)]);
  };
  list.addEventListener("mouseover", show);
  list.addEventListener("focusin", show);
  list.addEventListener("mouseleave", (event) => {
    if (!tip().contains(event.relatedTarget)) hideTip();
  });
  list.addEventListener("focusout", hideTip);
  list.addEventListener("keydown", (event) => {
    const all = [...list.children];
    const at = all.indexOf(document.activeElement);
    const next = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    all[at]?.setAttribute("tabindex", "-1");
    all[next].setAttribute("tabindex", "0");
    all[next].focus();
  });
  return el("div", { class: "token-view" }, el("p", { class: "help" }, t("tokenHelp")), legend(), list);
}

function legend() {
  const names = STEPS.map((least) => `≥ ${number(100 * least)} %`);
  names.push(`< ${number(100 * STEPS.at(-1))} %`);
  return el("p", { class: "legend help" }, `${t("legend")} `, names.map((name, index) => [el("span", { class: `p${index}` }, name), " "]));
}

// One tip for all.

const tip = () => byId("tip");
let owner = null;

function showTip(one, token) {
  hideTip();
  owner = one;
  owner.setAttribute("aria-describedby", "tip");
  const rows = token.top.map((other) =>
    el(
      "div",
      { class: other.token === token.token ? "row chosen" : "row" },
      el("code", {}, visible(other.token)),
      meter(other.p),
      el("span", { class: "number" }, percent(other.p)),
      other.token === token.token && el("span", { class: "unseen" }, ` (${t("chosen")}) `),
    ),
  );
  tip().replaceChildren(
    el("div", { class: "row first" }, el("code", {}, visible(token.token)), el("span", { class: "number" }, percent(token.p))),
    el("div", { class: "help" }, t("alternatives")),
    ...rows,
  );
  tip().hidden = false;
  placeTip();
}

/** Below its token, or above it where there is no room. */
export function placeTip() {
  if (!owner) return;
  const box = owner.getClientRects()[0] ?? owner.getBoundingClientRect();
  const size = tip().getBoundingClientRect();
  const below = box.bottom + 4 + size.height < innerHeight;
  tip().style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  tip().style.top = `${below ? box.bottom : Math.max(8, box.top - size.height)}px`;
}

function meter(p) {
  const bar = el("span", { class: "bar" }, el("span", {}));
  bar.firstChild.style.width = `${100 * p}%`;
  return bar;
}

export function hideTip() {
  tip().hidden = true;
  owner?.removeAttribute("aria-describedby");
  owner = null;
}

export const tipIsShown = () => !tip().hidden;
