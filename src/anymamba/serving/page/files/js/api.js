// Calls to the server. Every function throws ServerError with the server's own message.

const BASE = new URL("v1/", document.baseURI);
const KEY = "anymamba-key";

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Keep the API key for this tab. */
export function useKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** The model that the server serves: {id, has_chat_template, has_sessions}. */
export async function model() {
  return (await json("models")).data[0];
}

/** The sessions that the server keeps: a list of {id, n_tokens, bytes, used}, with used in seconds. */
export async function sessions() {
  return (await json("sessions")).data;
}

/** The text of a session. */
export async function sessionText(name) {
  return (await json(`sessions/${encodeURIComponent(name)}`)).text;
}

/** Delete a session of the server, if it has it. */
export async function deleteSession(name) {
  try {
    await json(`sessions/${encodeURIComponent(name)}`, { method: "DELETE" });
  } catch (error) {
    if (!(error instanceof ServerError && error.status === 404)) throw error;
  }
}

/** Send a request and yield the JSON objects of its stream. */
export async function* stream(path, body, signal) {
  const response = await send(path, { method: "POST", body: JSON.stringify({ ...body, stream: true }), signal });
  let buffer = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("The answer broke off: the server closed the connection. Try again.");
      const parts = (buffer + value).split(/\r?\n\r?\n/);
      buffer = parts.pop();
      for (const part of parts) {
        const data = part.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5)).join("\n").trim();
        if (data === "[DONE]") return;
        if (data) yield checked(JSON.parse(data));
      }
    }
  } catch (error) {
    throw error instanceof TypeError ? unreachable() : error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

function checked(object) {
  if (object.error) throw new ServerError(object.error.message);
  return object;
}

async function json(path, options = {}) {
  const response = await send(path, options);
  const text = await response.text();
  return text ? JSON.parse(text) : {};
}

async function send(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!response.ok) throw new ServerError(await reason(response), response.status);
  return response;
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

function unreachable() {
  return new ServerError("The server cannot be reached. Check that it runs, and try again.");
}
