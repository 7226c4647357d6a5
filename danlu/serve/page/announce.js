// What a screen reader says when something has happened; texts that grow are not read while they do.

import { byId } from "/shared/dom.js";

export function announce(text) {
  const place = byId("status");
  // The same text twice is said twice.
  place.textContent = "";
  setTimeout(() => (place.textContent = text), 50);
}
