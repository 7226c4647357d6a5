// Questions that are asked over the page.

import { byId, el } from "/shared/dom.js";
import { t } from "./texts.js";

/** Shows a dialog until it is answered; null where it is cancelled, else the field's text. */
function ask({ title, text = "", label = null, type = "text", value = "", action, note = null }) {
  return new Promise((resolve) => {
    const field = label && el("input", { id: "ask-field", type, autocomplete: "off", "aria-describedby": note && "ask-note" });
    const dialog = el(
      "dialog",
      { "aria-labelledby": "ask-title" },
      el(
        "form",
        { method: "dialog" },
        el("h2", { id: "ask-title" }, title),
        text && el("p", {}, text),
        note && el("p", { id: "ask-note", class: "bad" }, note),
        label && el("label", { for: "ask-field" }, label),
        field,
        el(
          "div",
          { class: "buttons" },
          el("button", { type: "button", onclick: () => dialog.close("") }, t("cancel")),
          el("button", { class: "main", value: "yes" }, action),
        ),
      ),
    );
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes" ? (field ? field.value : "yes") : null);
    });
    // Escape, whatever was answered before.
    dialog.addEventListener("cancel", () => (dialog.returnValue = ""));
    byId("dialogs").append(dialog);
    dialog.showModal();
    if (field) {
      field.value = value;
      field.select();
    }
  });
}

export const askDelete = (title) =>
  ask({ title: t("deleteTitle"), text: t("deleteAsk", { title }), action: t("delete") });

export const askName = (value) => ask({ title: t("renameTitle"), label: t("name"), value, action: t("save") });

export const askKey = (refused) =>
  ask({
    title: t("keyTitle"),
    text: t("keyAsk"),
    label: t("key"),
    type: "password",
    action: t("goOnButton"),
    note: refused ? t("keyWrong") : null,
  }).then((key) => key?.trim() || null);
