// Small settings that the browser keeps. Where it keeps nothing, a page works all the same.

export function recall(key, otherwise = null) {
  try {
    return localStorage.getItem(key) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export function keep(key, value) {
  try {
    localStorage.setItem(key, value);
  } catch {
    // It lasts until the page is left.
  }
}
