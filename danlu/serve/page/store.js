// Conversations in the browser's own storage, one entry each. What can't be kept or read is told, and what
// can't be read is left as it is.

import { isConversation } from "./tree.js";

const PREFIX = "danlu.chat.";

export const keyOf = (conversation) => PREFIX + conversation.id;
export const isOurs = (key) => key !== null && key.startsWith(PREFIX);

/** {conversations, the newest first; broken: keys of what can't be read; blocked: whether nothing is kept}. */
export function loadAll() {
  const conversations = [];
  const broken = [];
  try {
    for (const key of Object.keys(localStorage).filter(isOurs)) {
      const found = parse(localStorage.getItem(key));
      if (found && keyOf(found) === key) conversations.push(found);
      else broken.push(key);
    }
  } catch {
    return { conversations, broken, blocked: true };
  }
  conversations.sort((a, b) => b.changed - a.changed);
  return { conversations, broken, blocked: false };
}

export function parse(text) {
  try {
    const found = JSON.parse(text);
    return isConversation(found) ? found : null;
  } catch {
    return null;
  }
}

/** null, or why it could not be kept: "full" or "blocked". */
export function save(conversation) {
  try {
    localStorage.setItem(keyOf(conversation), JSON.stringify(conversation));
    return null;
  } catch (error) {
    return error.name === "QuotaExceededError" ? "full" : "blocked";
  }
}

export function raw(key) {
  return localStorage.getItem(key) ?? "";
}

export function forget(key) {
  try {
    localStorage.removeItem(key);
  } catch {
    // Nothing is kept anyway.
  }
}

/** Has the browser save a text as a file. */
export function download(name, text, type) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
