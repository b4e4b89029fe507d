// The list of sessions: conversations of this browser, with what the server keeps of each, and the server's others.

import { byId, h, iconButton, plural } from "./dom.js";

/** Draw the list. `kept` is the server's list. `calls` has open(id), remove(id), and adopt(id) for the server's others. */
export function draw(conversations, currentId, kept, calls) {
  const states = new Map(kept.map((session) => [session.id, session]));
  byId("session-list").replaceChildren(...conversations.map((conversation) => item(conversation, currentId, states.get(conversation.id), calls)));
  const own = new Set(conversations.map((conversation) => conversation.id));
  const others = kept.filter((session) => !own.has(session.id));
  byId("others").hidden = !others.length;
  byId("other-list").replaceChildren(...others.map((session) => other(session, calls)));
}

function item(conversation, currentId, state, calls) {
  const title = h("span", { class: "title" }, conversation.title || (conversation.mode === "chat" ? "New chat" : "New text"));
  const about = h("small", {}, `${when(conversation.used)}${state ? ` · ${plural(state.n_tokens, "token")} kept` : ""}`);
  const isCurrent = conversation.id === currentId;
  const open = h("button", { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, title: state && size(state), onclick: () => calls.open(conversation.id) }, title, about);
  const remove = iconButton("close", `Delete ${title.textContent}`, () => confirm(`Delete “${title.textContent}”, here and on the server?`) && calls.remove(conversation.id));
  return h("li", { class: isCurrent ? "current" : null }, open, remove);
}

function other(session, calls) {
  const label = h("button", { type: "button", class: "open", title: "Open as a text", onclick: () => calls.adopt(session.id) }, h("span", { class: "title" }, session.id), h("small", {}, `${when(1000 * session.used)} · ${plural(session.n_tokens, "token")} kept`));
  return h("li", {}, label, iconButton("close", `Delete ${session.id}`, () => confirm(`Delete “${session.id}” on the server?`) && calls.remove(session.id)));
}

const size = (session) => `The server keeps the state after ${plural(session.n_tokens, "token")}: ${(session.bytes / 1e6).toFixed(1)} MB`;

function when(time) {
  const minutes = Math.round((Date.now() - time) / 60_000);
  if (minutes < 1) return "just now";
  if (minutes < 60) return `${minutes} min ago`;
  if (minutes < 24 * 60) return `${Math.round(minutes / 60)} h ago`;
  return new Date(time).toLocaleDateString();
}
