// The chat page: one conversation at a time, its answers, and what stands around it.

import { byId, el } from "/shared/dom.js";
import { isDark, setDark } from "/shared/theme.js";
import { announce } from "./announce.js";
import * as api from "./api.js";
import { askDelete, askKey, askName } from "./dialogs.js";
import { icon } from "./icons.js";
import { drawFields, keepSettings, request, reset, settings } from "./settings.js";
import * as store from "./store.js";
import { failure, i18n, t } from "./texts.js";
import { Thread } from "./thread.js";
import { hideTip, placeTip, readToken, tipIsShown } from "./tokens.js";
import * as tree from "./tree.js";

const conversations = new Map(); // by id, what is kept
const notices = new Map(); // by a name: {text, actions}
let models = null; // null until they are known
let leaving = false;
let run = null; // {controller, nodes, done} while answers come

const chat = {
  conversation: tree.newConversation(),
  /** Of answers since the page was opened: too much to be kept. */
  tokens: new Map(),
  get busy() {
    return run !== null;
  },
  isRunning: (node) => run !== null && run.nodes.includes(node),
  again,
  edit,
  retry,
  go,
  goOn,
  judge,
  better,
};
const thread = new Thread(chat);
const shown = (id) => chat.conversation.nodes[id];

// Answers

async function send() {
  const field = byId("message");
  const text = field.value;
  if (!text.trim() || run || !canAnswer()) return;
  field.value = "";
  // A message that got no answer stays as another version of this one: two in a row make no conversation.
  const said = tree.branch(chat.conversation);
  while (said.length && (said.at(-1).role === "user" || !said.at(-1).content.trim())) said.pop();
  const question = tree.add(chat.conversation, said.at(-1)?.id ?? tree.ROOT, "user", text);
  await answer(question);
}

async function edit(node, text) {
  if (!canAnswer()) return;
  byId("send").focus();
  await answer(tree.add(chat.conversation, node.parent, "user", text));
}

async function again(question) {
  if (run || !canAnswer()) return;
  byId("send").focus();
  await answer(question);
}

/** In the place of an answer that failed, where nothing came of it; else beside it. */
async function retry(node) {
  if (run || !canAnswer()) return;
  const question = shown(node.parent);
  const failed = tree.together(chat.conversation, node);
  if (failed.every((one) => !one.content && !one.children.length)) failed.forEach((one) => tree.remove(chat.conversation, one.id));
  byId("send").focus();
  await answer(question);
}

const canAnswer = () => models !== null && settings.model !== null;

/** One answer to a message, or two side by side. */
async function answer(question) {
  const conversation = chat.conversation;
  const asked = [{ model: settings.model, sampling: settings.first }];
  if (settings.second !== null) asked.push({ model: settings.second, sampling: settings.own ? settings.other : settings.first });
  const pair = asked.length > 1 ? { pair: tree.newPair() } : {};
  const nodes = asked.map(({ model }) => tree.add(conversation, question.id, "assistant", "", { model, ...pair }));
  question.shown = nodes[0].id;
  const controller = new AbortController();
  let end;
  run = { controller, nodes, done: new Promise((resolve) => (end = resolve)) };
  keepConversation(conversation);
  draw();
  scrollTo({ top: document.body.scrollHeight });
  const said = tree.messages(conversation, question.id);
  const body = ({ model, sampling }) => ({ model, messages: said, logprobs: true, top_logprobs: 5, ...request(sampling) });
  await Promise.all(nodes.map((node, number) => fill(node, body(asked[number]), controller.signal)));
  run = null;
  conversation.changed = Date.now();
  keepConversation(conversation);
  draw();
  end();
  announce(nodes.map(outcome).join(" "));
}

const outcome = (node) => (node.error ? failure(node.error) : t("finished", { model: node.model, text: node.content.slice(0, 500) }));

/** Lets one answer come in. What goes wrong stands in the node afterwards. */
async function fill(node, body, signal) {
  const begin = performance.now();
  const tokens = [];
  let first = null;
  let last = null;
  const measure = (count) => {
    if (first !== null) node.stats = { tokens: count, first: (first - begin) / 1000, seconds: (last - first) / 1000 };
  };
  chat.tokens.set(node.id, tokens);
  try {
    for await (const chunk of api.chat(body, signal)) {
      const choice = chunk.choices[0];
      const told = choice?.logprobs?.content ?? [];
      if (told.length || choice?.delta.content) {
        last = performance.now();
        first ??= last;
      }
      tokens.push(...told.map(readToken));
      node.content += choice?.delta.content ?? "";
      node.reason = choice?.finish_reason ?? node.reason;
      measure(chunk.usage?.completion_tokens ?? tokens.length);
      const atEnd = isAtEnd();
      thread.update(node);
      if (atEnd) scrollTo({ top: document.body.scrollHeight });
    }
  } catch (error) {
    // Leaving the page ends its requests, which is nobody's failure.
    if (leaving) return;
    if (error.name === "AbortError") node.reason = "stopped";
    else if (error instanceof api.ApiError) node.error = { kind: error.kind, detail: error.detail };
    else {
      node.error = { kind: "page", detail: String(error) };
      console.error(error);
    }
  }
}

const isAtEnd = () => innerHeight + scrollY >= document.body.scrollHeight - 80;

/** The promise is kept once nothing comes any more. */
function stop() {
  run?.controller.abort();
  return run?.done;
}

// Branches

function go(node, by) {
  if (run) return;
  const all = tree.versions(chat.conversation, node);
  const next = all[all.findIndex((ids) => ids.includes(node.id)) + by];
  if (!next) return;
  const parent = shown(node.parent);
  parent.shown = next[0];
  keepConversation(chat.conversation);
  draw();
  // The buttons are those of another message now.
  const element = thread.element(shown(parent.shown));
  const [same, other] = by < 0 ? [".previous", ".next"] : [".next", ".previous"];
  const button = element.querySelector(same);
  (button.disabled ? element.querySelector(other) : button).focus();
  announce(element.querySelector(".versions .unseen").textContent);
}

function goOn(node) {
  if (run) return;
  shown(node.parent).shown = node.id;
  keepConversation(chat.conversation);
  draw();
}

// Judgements

async function judge(node, label) {
  const conversation = chat.conversation;
  const rating = label ? "up" : "down";
  if (node.rating === rating) return;
  const earlier = node.rating !== undefined;
  const row = { prompt: tree.messages(conversation, node.parent), completion: said(node), label, model: node.model };
  if (!(await write(row, node, earlier))) return;
  node.rating = rating;
  keepConversation(conversation);
  thread.update(node);
}

async function better(node) {
  if (node.better) return;
  const conversation = chat.conversation;
  const other = tree.together(conversation, node).find((one) => one !== node);
  if (!other.content.trim()) return keptText(node, t("needBoth"));
  if (other.content === node.content) return keptText(node, t("sameAnswers"));
  const row = { prompt: tree.messages(conversation, node.parent), chosen: said(node), rejected: said(other) };
  const earlier = other.better === true;
  if (!(await write(row, node, earlier))) return;
  node.better = true;
  other.better = false;
  conversation.nodes[node.parent].shown = node.id;
  keepConversation(conversation);
  draw();
}

const writing = new Set(); // answers whose judgement is on its way
const said = (node) => [{ role: "assistant", content: node.content }];

async function write(row, node, earlier) {
  if (writing.has(node)) return false;
  writing.add(node);
  try {
    const file = await api.prefer(row);
    keptText(node, t(earlier ? "keptAgain" : "kept", { file }));
    return true;
  } catch (error) {
    keptText(node, `${t("notKept")} ${failure(error)}`, true);
    return false;
  } finally {
    writing.delete(node);
  }
}

function keptText(node, text, isBad = false) {
  const place = thread.element(node)?.querySelector(".kept");
  if (!place) return;
  place.textContent = text;
  place.classList.toggle("bad", isBad);
  announce(text);
}

// What is kept

function keepConversation(conversation) {
  if (!tree.branch(conversation).length) return;
  conversations.set(conversation.id, conversation);
  const failed = store.save(conversation);
  tell("storage", failed && { text: () => t(failed === "full" ? "storageFull" : "storageBlocked", { title: tree.titleOf(conversation) }) });
  drawList();
}

function load() {
  const { conversations: found, broken, blocked } = store.loadAll();
  conversations.clear();
  for (const one of found) conversations.set(one.id, one);
  if (blocked) tell("storage", { text: () => t("storageBlocked") });
  tellBroken(broken);
}

function tellBroken(broken) {
  if (!broken.length) return tell("broken", null);
  const rest = () => store.download("danlu-unreadable.txt", broken.map(store.raw).join("\n"), "text/plain");
  const forget = () => {
    broken.forEach(store.forget);
    tell("broken", null);
  };
  tell("broken", {
    text: () => (broken.length === 1 ? t("brokenOne") : t("broken", { n: broken.length })),
    actions: [["brokenSave", rest], ["brokenDelete", forget]],
  });
}

async function open(conversation) {
  await stop();
  chat.conversation = conversation;
  thread.forget();
  showNav(false);
  draw();
  drawList();
  scrollTo({ top: document.body.scrollHeight });
}

async function startNew() {
  await open(tree.newConversation());
  byId("message").focus();
}

async function rename(conversation) {
  const name = await askName(tree.titleOf(conversation));
  if (name === null) return;
  conversation.title = name.trim().slice(0, 200);
  keepConversation(conversation);
  drawTitle();
  focusRow(conversation, ".rename");
}

async function erase(conversation) {
  if ((await askDelete(tree.titleOf(conversation))) === null) return focusRow(conversation, ".erase");
  if (conversation === chat.conversation) await stop();
  conversations.delete(conversation.id);
  store.forget(store.keyOf(conversation));
  if (conversation === chat.conversation) await startNew();
  else byId("new").focus();
  drawList();
  announce(t("deleted"));
}

const focusRow = (conversation, selector) => byId(`row-${conversation.id}`)?.querySelector(selector)?.focus();

function exportRows(some) {
  const rows = some.map(tree.trainingRow).filter((row) => row !== null);
  if (!rows.length) return tell("export", { text: () => t("nothingToExport") });
  tell("export", null);
  store.download("conversations.jsonl", rows.map((row) => JSON.stringify(row) + "\n").join(""), "application/jsonl");
  announce(t("exported", { n: rows.length }));
}

// Drawing

/** Tells something above the messages until it is dismissed; null takes it away. */
function tell(name, notice) {
  if (!notice && !notices.has(name)) return;
  if (notice) notices.set(name, notice);
  else notices.delete(name);
  drawNotices();
}

function drawNotices() {
  byId("notices").replaceChildren(
    ...[...notices].map(([name, { text, actions = [] }]) =>
      el(
        "div",
        { class: "notice" },
        el("p", {}, text()),
        actions.map(([label, act]) => el("button", { type: "button", onclick: act }, t(label))),
        el("button", { type: "button", class: "bare small", "aria-label": t("dismiss"), onclick: () => tell(name, null) }, icon("close")),
      ),
    ),
  );
}

function draw() {
  const conversation = chat.conversation;
  const empty = !tree.branch(conversation).length;
  thread.draw(conversation);
  byId("welcome").hidden = !empty;
  byId("welcome-compare").hidden = settings.second === null;
  document.body.classList.toggle("compares", settings.second !== null || byId("thread").querySelector(".pair") !== null);
  drawTitle();
  const system = conversation.system.trim();
  byId("system-shown").hidden = !system;
  byId("system-text").textContent = system;
  const button = byId("send");
  button.replaceChildren(icon(run ? "stop" : "send"), el("span", {}, t(run ? "stop" : "send")));
  button.classList.toggle("main", !run);
  button.disabled = !run && !canAnswer();
}

function drawTitle() {
  const title = tree.titleOf(chat.conversation) || t("untitled");
  byId("title").textContent = title;
  document.title = tree.branch(chat.conversation).length ? `${title} · danlu` : t("title");
}

function drawList() {
  const all = [...conversations.values()].sort((a, b) => b.changed - a.changed);
  byId("none").hidden = all.length > 0;
  byId("list").replaceChildren(
    ...all.map((one) => {
      const title = tree.titleOf(one) || t("untitled");
      const current = one.id === chat.conversation.id;
      const small = (name, drawing, label, act) =>
        el("button", { type: "button", class: `bare small ${name}`, "aria-label": label, title: label, onclick: act }, icon(drawing));
      return el(
        "li",
        { id: `row-${one.id}`, class: current ? "current" : null },
        el("button", { type: "button", class: "bare open", "aria-current": current ? "true" : null, onclick: () => open(one) }, el("span", {}, title)),
        small("rename", "pencil", t("renameThis", { title }), () => rename(one)),
        small("erase", "trash", t("deleteThis", { title }), () => erase(one)),
      );
    }),
  );
}

function drawModels() {
  const names = (models ?? []).map((card) => {
    const name = card.parent ? t("adapterOf", { model: card.id, parent: card.parent }) : card.id;
    return el("option", { value: card.id, disabled: !card.chats }, card.chats ? name : t("completesOnly", { model: name }));
  });
  byId("model").replaceChildren(...names);
  byId("second").replaceChildren(el("option", { value: "" }, t("noCompare")), ...names.map((one) => one.cloneNode(true)));
  byId("model").value = settings.model ?? "";
  byId("second").value = settings.second ?? "";
  byId("model").disabled = byId("second").disabled = settings.model === null;
  byId("completes-help").hidden = (models ?? []).every((card) => card.chats);
}

async function loadModels() {
  tell("models", null);
  try {
    models = await api.models();
  } catch (error) {
    const text = () => `${t("modelsFailed")} ${failure(error)}`;
    return tell("models", { text, actions: [["retry", loadModels]] });
  }
  const chatting = models.filter((card) => card.chats).map((card) => card.id);
  if (!chatting.includes(settings.model)) settings.model = chatting[0] ?? null;
  if (!chatting.includes(settings.second)) settings.second = null;
  if (!chatting.length) tell("models", { text: () => t("noChatModel") });
  drawModels();
  draw();
}

function drawTexts() {
  i18n.apply();
  byId("language").textContent = t("language");
  byId("language").lang = i18n.language === "en" ? "zh-CN" : "en";
  drawTheme();
  drawModels();
  drawFields();
  drawNotices();
  thread.forget();
  drawList();
  draw();
}

function drawTheme() {
  byId("theme").textContent = t(isDark() ? "light" : "dark");
  byId("theme").setAttribute("aria-label", t(isDark() ? "toLight" : "toDark"));
}

/** The list of conversations, where there is no room beside the messages. */
function showNav(open) {
  document.body.classList.toggle("nav-open", open);
  byId("main").inert = open;
  byId("open-nav").setAttribute("aria-expanded", String(open));
}

// What is pressed

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (run) stop();
  else send();
});
byId("message").addEventListener("keydown", (event) => {
  // Enter that ends a composition, of Chinese for instance, is not the one that sends.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  if (!run) send();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || event.isComposing || document.querySelector("dialog[open]")) return;
  if (tipIsShown()) hideTip();
  else if (document.body.classList.contains("nav-open")) closeNav();
  else stop();
});
byId("tip").addEventListener("mouseleave", hideTip);
addEventListener("scroll", placeTip, { passive: true });
byId("open-nav").addEventListener("click", () => {
  showNav(true);
  byId("close-nav").focus();
});
const closeNav = () => {
  showNav(false);
  byId("open-nav").focus();
};
byId("close-nav").addEventListener("click", closeNav);
byId("new").addEventListener("click", startNew);
byId("export-this").addEventListener("click", () => exportRows([chat.conversation]));
byId("export-all").addEventListener("click", () => exportRows([...conversations.values()]));
byId("theme").addEventListener("click", () => {
  setDark(!isDark());
  drawTheme();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawTheme);
byId("language").addEventListener("click", () => {
  i18n.language = i18n.language === "en" ? "zh" : "en";
  drawTexts();
});
byId("model").addEventListener("change", () => {
  settings.model = byId("model").value;
  keepSettings();
});
byId("second").addEventListener("change", () => {
  settings.second = byId("second").value || null;
  keepSettings();
  drawFields();
  draw();
});
const openSettings = () => {
  byId("system").value = chat.conversation.system;
  drawFields();
  byId("settings").showModal();
};
byId("open-settings").addEventListener("click", openSettings);
byId("change-system").addEventListener("click", openSettings);
byId("close-settings").addEventListener("click", () => byId("settings").close());
byId("settings").addEventListener("close", draw);
byId("system").addEventListener("input", () => {
  chat.conversation.system = byId("system").value;
  keepConversation(chat.conversation);
});
byId("reset").addEventListener("click", () => {
  reset();
  announce(t("wasReset"));
});
// What has come of an answer is kept too; another tab may have changed what is kept.
addEventListener("pagehide", () => {
  leaving = true;
  if (run) store.save(chat.conversation);
});
addEventListener("pageshow", () => (leaving = false));
addEventListener("storage", (event) => {
  if (event.key !== null && !store.isOurs(event.key)) return;
  load();
  const same = conversations.get(chat.conversation.id);
  if (same && !run) {
    chat.conversation = same;
    thread.forget();
    draw();
  }
  drawList();
});

for (const [id, name] of Object.entries({ "open-nav": "menu", "close-nav": "close", "close-settings": "close" })) byId(id).append(icon(name));
byId("new").prepend(icon("plus"));
byId("open-settings").prepend(icon("sliders"));
api.onKeyNeeded(askKey);
load();
const newest = conversations.values().next().value;
if (newest) chat.conversation = newest;
drawTexts();
loadModels();
