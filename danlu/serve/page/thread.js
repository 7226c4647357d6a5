// The branch of a conversation that is shown, message by message.

import { byId, el } from "/shared/dom.js";
import { icon } from "./icons.js";
import { copyButton, Formatted } from "./markdown.js";
import { failure, number, t } from "./texts.js";
import { hideTip, tokenView } from "./tokens.js";
import { branch, together, versions } from "./tree.js";

export class Thread {
  /** `chat`: what can be done with messages, and the tokens of answers; see main.js. */
  constructor(chat) {
    this.chat = chat;
    this.views = new Map();
  }

  /** Draws the branch anew; messages that stay keep their elements. */
  draw(conversation) {
    hideTip();
    const shown = branch(conversation);
    const views = new Map();
    const viewOf = (node) => {
      const view = this.views.get(node.id) ?? (node.role === "user" ? new Question(this.chat, node) : new Answer(this.chat, node));
      views.set(node.id, view);
      return view;
    };
    const parts = shown.map((node) => {
      const all = node.role === "user" ? [node] : together(conversation, node);
      const elements = all.map((one) => viewOf(one).element);
      if (all.length === 1) return elements[0];
      return elements[0].closest(".pair") ?? el("div", { class: "pair" }, elements);
    });
    this.views = views;
    // What stays is not moved: it would lose the focus.
    let at = byId("thread").firstChild;
    for (const part of parts) {
      if (part === at) at = at.nextSibling;
      else byId("thread").insertBefore(part, at);
    }
    while (at) {
      const next = at.nextSibling;
      at.remove();
      at = next;
    }
    for (const view of views.values()) view.update();
  }

  update(node) {
    this.views.get(node.id)?.update();
  }

  /** All of it anew, in another language. */
  forget() {
    this.views.clear();
  }

  element(node) {
    return this.views.get(node.id)?.element;
  }
}

/** ‹ 2/3 › */
class Versions {
  constructor(chat, node) {
    this.chat = chat;
    this.node = node;
    this.place = el("span", { class: "number" });
    this.said = el("span", { class: "unseen" });
    const step = (name, drawing, by) =>
      el("button", { type: "button", class: `bare small ${name}`, "aria-label": t(name), onclick: () => chat.go(node, by) }, icon(drawing));
    this.back = step("previous", "back", -1);
    this.forth = step("next", "forth", 1);
    this.place.setAttribute("aria-hidden", "true");
    this.element = el("span", { class: "versions", role: "group", "aria-label": t("versions") }, this.back, this.place, this.said, this.forth);
  }

  update() {
    const all = versions(this.chat.conversation, this.node);
    const at = all.findIndex((ids) => ids.includes(this.node.id));
    this.element.hidden = all.length < 2;
    this.place.textContent = `${at + 1}/${all.length}`;
    this.said.textContent = t("versionOf", { i: at + 1, n: all.length });
    this.back.disabled = this.chat.busy || at === 0;
    this.forth.disabled = this.chat.busy || at === all.length - 1;
  }
}

class Question {
  constructor(chat, node) {
    this.chat = chat;
    this.node = node;
    this.body = el("div", { class: "said" }, node.content);
    this.editButton = el("button", { type: "button", class: "bare", onclick: () => this.edit() }, icon("pencil"), t("edit"));
    this.versions = new Versions(chat, node);
    this.retry = el("button", { type: "button", class: "bare", onclick: () => chat.again(node) }, icon("again"), t("retry"));
    this.actions = el("div", { class: "actions" }, this.versions.element, this.retry, copyButton("copy", () => node.content), this.editButton);
    this.element = el("article", { class: "question", "aria-label": t("you") }, el("h2", { class: "unseen" }, t("you")), this.body, this.actions);
  }

  update() {
    this.versions.update();
    this.editButton.disabled = this.retry.disabled = this.chat.busy;
    // Only where the answer was lost, for instance with the page.
    this.retry.hidden = this.node.children.length > 0;
  }

  edit() {
    const field = el("textarea", { id: `edit-${this.node.id}`, rows: "3", "aria-describedby": `edit-help-${this.node.id}` });
    field.value = this.node.content;
    const end = () => {
      form.remove();
      this.body.hidden = this.actions.hidden = false;
      this.editButton.focus();
    };
    const send = () => {
      if (!field.value.trim() || this.chat.busy) return;
      end();
      this.chat.edit(this.node, field.value);
    };
    const form = el(
      "form",
      { class: "editing", onsubmit: (event) => (event.preventDefault(), send()) },
      el("label", { for: field.id, class: "unseen" }, t("editMessage")),
      field,
      el(
        "div",
        { class: "buttons" },
        el("span", { class: "help", id: `edit-help-${this.node.id}` }, t("editHelp")),
        el("button", { type: "button", onclick: end }, t("cancel")),
        el("button", { class: "main" }, t("send")),
      ),
    );
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || event.keyCode === 229) return;
      if (event.key === "Escape") {
        event.stopPropagation();
        end();
      } else if (event.key === "Enter" && !event.shiftKey) {
        event.preventDefault();
        send();
      }
    });
    this.body.hidden = this.actions.hidden = true;
    this.actions.before(form);
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

class Answer {
  constructor(chat, node) {
    this.chat = chat;
    this.node = node;
    this.text = new Formatted();
    this.tokenPlace = el("div", { hidden: true });
    this.stats = el("p", { class: "stats" });
    this.error = el("span");
    this.retry = el("button", { type: "button", onclick: () => chat.retry(node) }, icon("again"), t("retry"));
    this.failed = el("div", { class: "failed", hidden: true }, this.error, this.retry);
    const button = (name, drawing, act, shown = t(name)) =>
      el("button", { type: "button", class: "bare", onclick: act, "aria-label": shown ? null : t(name), title: shown ? null : t(name) }, icon(drawing), shown);
    this.again = button("again", "again", () => chat.again(chat.conversation.nodes[node.parent]));
    this.tokens = button("tokens", "tokens", () => this.showTokens());
    this.up = button("good", "up", () => chat.judge(node, true), null);
    this.down = button("bad", "down", () => chat.judge(node, false), null);
    this.better = button("better", "check", () => chat.better(node));
    this.goOn = button("goOn", "forth", () => chat.goOn(node));
    this.versions = new Versions(chat, node);
    this.copy = copyButton("copy", () => node.content);
    this.kept = el("span", { class: "help kept" });
    this.actions = el("div", { class: "actions" }, this.versions.element, this.copy, this.again, this.tokens, this.up, this.down, this.kept);
    this.choice = el("div", { class: "actions choice" }, this.better, this.goOn);
    const name = node.model ?? t("assistant");
    this.element = el(
      "article",
      { class: "answer", "aria-label": name },
      el("h2", {}, name),
      this.text.element,
      this.tokenPlace,
      this.failed,
      this.stats,
      this.choice,
      this.actions,
    );
  }

  update() {
    const { chat, node } = this;
    const running = chat.isRunning(node);
    this.element.setAttribute("aria-busy", String(running));
    this.text.show(node.content, !running);
    this.stats.textContent = running && !node.content ? t("answering") : this.statsText(running);
    this.failed.hidden = running || !node.error;
    if (node.error) this.error.textContent = failure(node.error);
    const pair = together(chat.conversation, node);
    const isShown = chat.conversation.nodes[node.parent].shown === node.id;
    this.actions.hidden = running;
    this.choice.hidden = running || pair.length < 2;
    this.element.classList.toggle("aside", pair.length > 1 && !isShown);
    this.again.disabled = this.retry.disabled = chat.busy;
    this.tokens.hidden = !chat.tokens.get(node.id)?.length;
    this.up.disabled = this.down.disabled = this.better.disabled = chat.busy || !node.content.trim();
    this.copy.disabled = !node.content;
    press(this.tokens, !this.tokenPlace.hidden);
    press(this.up, node.rating === "up");
    press(this.down, node.rating === "down");
    press(this.better, node.better === true);
    press(this.goOn, isShown);
    this.goOn.disabled = chat.busy;
    this.versions.update();
    if (running && !this.tokenPlace.hidden) this.hideTokens();
  }

  statsText(running) {
    const { stats, reason, error } = this.node;
    const parts = [];
    if (stats?.tokens) {
      parts.push(t("stats", { tokens: number(stats.tokens) }));
      if (stats.tokens > 1 && stats.seconds > 0) parts.push(t("rate", { rate: number((stats.tokens - 1) / stats.seconds, 1) }));
      parts.push(t("first", { seconds: number(stats.first, 2) }));
    }
    const why = ["stop", "length", "stopped"].includes(reason) ? reason : "unknown";
    if (!running && !error) parts.push(t(`reason_${why}`));
    return parts.join(" · ");
  }

  showTokens() {
    if (!this.tokenPlace.hidden) return this.hideTokens();
    this.tokenPlace.replaceChildren(tokenView(this.chat.tokens.get(this.node.id)));
    this.tokenPlace.hidden = false;
    this.text.element.hidden = true;
    press(this.tokens, true);
  }

  hideTokens() {
    hideTip();
    this.tokenPlace.hidden = true;
    this.tokenPlace.replaceChildren();
    this.text.element.hidden = false;
    press(this.tokens, false);
  }
}

const press = (button, pressed) => button.setAttribute("aria-pressed", String(pressed));
