// The server's endpoints. Every failure is an ApiError, whose `kind` has a text in texts.js.

export class ApiError extends Error {
  constructor(kind, detail = "") {
    super(detail || kind);
    this.kind = kind;
    this.detail = detail;
  }
}

const KEY = "danlu.key";
const KINDS = { 401: "key", 413: "large", 429: "busy", 503: "ending", 504: "slow" };
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch {
  // The key lasts until the page is left.
}

/** Asks for the key: (whether the last one was refused) → the key, or null. main.js sets it. */
let askForKey = async () => null;
let asking = null;

export function onKeyNeeded(ask) {
  askForKey = ask;
}

async function newKey(refused) {
  // Several requests may be refused at once; the reader is asked once.
  asking ??= askForKey(refused).finally(() => (asking = null));
  const given = await asking;
  if (given === null) throw new ApiError("key");
  key = given;
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // as above
  }
}

async function send(path, body, signal) {
  for (;;) {
    const used = key;
    const headers = used ? { authorization: `Bearer ${used}` } : {};
    if (body) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("network");
    }
    if (response.ok) return response;
    if (response.status === 401) {
      if (key === used) await newKey(used !== "");
      continue;
    }
    let detail = `HTTP ${response.status}`;
    try {
      detail = (await response.json()).error.message;
    } catch {
      // Not from our server: its status says what there is to say.
    }
    throw new ApiError(KINDS[response.status] ?? (response.status >= 500 ? "server" : "refused"), detail);
  }
}

async function json(path, body, signal) {
  const response = await send(path, body, signal);
  try {
    return await response.json();
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("network");
  }
}

export const models = async () => (await json("v1/models")).data;
export const markdown = async (text) => (await json("page/markdown", { text })).html;
export const prefer = async (row) => (await json("page/preference", { row })).saved;

/** Chunks of an answer, as they come. */
export async function* chat(body, signal) {
  const response = await send("v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, signal);
  let whole = false;
  for await (const data of events(response)) {
    // Read to the end all the same: to leave now would look like stopping it.
    if (data === "[DONE]") whole = true;
    if (whole) continue;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError("server", chunk.error.message);
    yield chunk;
  }
  if (!whole) throw new ApiError("cut");
}

/** The data of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let left = "";
  try {
    for (;;) {
      let piece;
      try {
        piece = await reader.read();
      } catch (error) {
        throw error.name === "AbortError" ? error : new ApiError("cut");
      }
      if (piece.done) return;
      left += piece.value;
      const lines = left.split("\n");
      left = lines.pop();
      for (const line of lines) if (line.startsWith("data: ")) yield line.slice(6).trimEnd();
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
