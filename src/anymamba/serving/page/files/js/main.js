// The page: which conversation is open, the two modes, keys, and the calls that the views share.

import * as api from "./api.js";
import * as chat from "./chat.js";
import * as complete from "./complete.js";
import { byId } from "./dom.js";
import { icon } from "./icons.js";
import * as runs from "./runs.js";
import * as sessions from "./sessions.js";
import * as settings from "./settings.js";
import * as status from "./status.js";
import * as store from "./store.js";
import * as tokens from "./tokens.js";
import { emptyTree } from "./tree.js";

const OPEN = "anymamba-open";
const THEME = "anymamba-theme";

let conversations = [];
let current = null;
let shown = null; // what the view of the current conversation can do
let kept = []; // the server's sessions
let model = null; // what the server says of it
let asking = null; // the question for the model that is under way

const app = { refresh, fail, requestFields };

async function start() {
  theme(localStorage.getItem(THEME));
  for (const place of document.querySelectorAll("[data-icon]")) place.append(icon(place.dataset.icon));
  settings.start(dress);
  dress();
  tokens.start();
  listen();
  try {
    conversations = await store.all();
  } catch (error) {
    status.complain(`This browser keeps no conversations: ${error.message}`);
  }
  const last = conversations.find((conversation) => conversation.id === localStorage.getItem(OPEN));
  show(last ?? conversations[0] ?? fresh("chat"));
  await connect();
}

/** Ask for the model and the sessions, once at a time. */
function connect() {
  return (asking ??= learn().finally(() => (asking = null)));
}

async function learn() {
  try {
    model = await api.model();
    byId("model").textContent = model.id;
    if (!model.has_chat_template && !conversations.length && shown.isEmpty()) inMode("complete");
    await refresh();
  } catch (error) {
    fail(error, [["Try again", connect]]);
  }
}

/** The fields of every request of a conversation. They wait for the model: without it no session would be named. */
async function requestFields(conversation) {
  if (!model) await connect();
  return { model: model?.id, ...(model?.has_sessions && { session: conversation.id }) };
}

// ---------------------------------------------------------------------------------------------- conversations

function fresh(mode) {
  const content = mode === "chat" ? { tree: emptyTree(), system: "" } : { text: complete.emptyText() };
  return { id: identifier(), title: "", mode, created: Date.now(), used: Date.now(), ...content };
}

/** A random name. crypto.randomUUID is missing on pages that are not served over HTTPS or from this machine. */
function identifier() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

function show(conversation) {
  shown?.close();
  runs.stop();
  tokens.close();
  status.clear();
  document.onselectionchange = null;
  current = conversation;
  localStorage.setItem(OPEN, conversation.id);
  const open = conversation.mode === "chat" ? chat.open : complete.open;
  const own = { ...app, save: () => save(conversation) };
  shown = open(conversation, byId("view"), byId("composer"), own);
  byId("mode-chat").setAttribute("aria-pressed", conversation.mode === "chat");
  byId("mode-complete").setAttribute("aria-pressed", conversation.mode !== "chat");
  drawSessions();
  if (isNarrow()) drawers(null);
  if (matchMedia("(pointer: fine)").matches) shown.focus();
}

async function save(conversation) {
  if (conversation.isDeleted) return;
  conversation.used = Date.now();
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  conversations.sort((a, b) => b.used - a.used);
  drawSessions();
  try {
    await store.put(conversation);
  } catch (error) {
    status.complain(`This browser cannot keep the conversation: ${error.message}`);
  }
}

async function remove(id) {
  try {
    if (kept.some((session) => session.id === id)) await api.deleteSession(id);
    const conversation = conversations.find((other) => other.id === id);
    if (conversation) conversation.isDeleted = true; // an answer that is being written does not bring it back
    await store.remove(id);
  } catch (error) {
    return fail(error);
  }
  conversations = conversations.filter((conversation) => conversation.id !== id);
  kept = kept.filter((session) => session.id !== id);
  if (current.id === id) show(conversations[0] ?? fresh(current.mode));
  await refresh();
}

/** Open a session that only the server has, as a text. */
async function adopt(id) {
  try {
    const text = { ...complete.emptyText(), draft: [{ text: await api.sessionText(id) }] };
    const conversation = { ...fresh("complete"), id, title: id, text };
    show(conversation);
    await save(conversation);
  } catch (error) {
    fail(error);
  }
}

function inMode(mode) {
  if (current.mode === mode) return;
  const last = conversations.find((conversation) => conversation.mode === mode);
  show(shown.isEmpty() || !last ? fresh(mode) : last);
}

function step(by) {
  const next = conversations[conversations.indexOf(current) + by];
  if (next) show(next);
}

function drawSessions() {
  const calls = { open: (id) => show(conversations.find((conversation) => conversation.id === id)), remove, adopt };
  sessions.draw(conversations, current.id, kept, calls);
}

/** Ask the server again what it keeps. */
async function refresh() {
  try {
    kept = model?.has_sessions ? await api.sessions() : [];
    drawSessions();
  } catch (error) {
    fail(error);
  }
}

// ---------------------------------------------------------------------------------------------- errors

function fail(error, ways = []) {
  if (error.status === 401) return askForKey();
  const isTemplate = current.mode === "chat" && /template/.test(error.message);
  if (!(error instanceof api.ServerError)) console.error(error);
  status.complain(error.message, isTemplate ? [["Complete instead", () => inMode("complete")]] : ways);
}

function askForKey() {
  const dialog = byId("key-dialog");
  if (dialog.open) return;
  dialog.onclose = () => {
    if (dialog.returnValue !== "ok") return status.complain("The server wants an API key.", [["Enter a key", askForKey]]);
    api.useKey(byId("key-input").value);
    byId("key-input").value = "";
    connect();
  };
  dialog.returnValue = "";
  dialog.showModal();
}

// ---------------------------------------------------------------------------------------------- surroundings

/** Let the text look as the settings say. */
function dress() {
  const { colour, mono } = settings.values();
  document.body.classList.toggle("coloured", colour);
  document.body.classList.toggle("mono", mono);
}

function theme(name) {
  if (name) document.documentElement.dataset.theme = name;
}

function turnTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme ?? (dark ? "dark" : "light");
  const next = now === "dark" ? "light" : "dark";
  localStorage.setItem(THEME, next);
  theme(next);
}

const isNarrow = () => matchMedia("(max-width: 60rem)").matches;

/** Open one of the drawers, or close both. On a wide window the sessions are always there. */
function drawers(name) {
  for (const id of ["sessions", "settings"]) {
    const open = id === name && !byId(id).classList.contains("open");
    byId(id).classList.toggle("open", open);
    byId(`open-${id}`).setAttribute("aria-expanded", open);
  }
}

function listen() {
  byId("new").addEventListener("click", () => show(fresh(current.mode)));
  byId("mode-chat").addEventListener("click", () => inMode("chat"));
  byId("mode-complete").addEventListener("click", () => inMode("complete"));
  byId("open-sessions").addEventListener("click", () => drawers("sessions"));
  byId("open-settings").addEventListener("click", () => drawers("settings"));
  byId("theme").addEventListener("click", turnTheme);
  byId("help-button").addEventListener("click", () => byId("help").showModal());
  byId("view").addEventListener("pointerdown", () => isNarrow() && drawers(null));
  document.addEventListener("keydown", keys);
}

const ALT_KEYS = {
  KeyN: () => show(fresh(current.mode)),
  ArrowUp: () => step(-1),
  ArrowDown: () => step(1),
  KeyK: () => shown.turn(-1),
  KeyJ: () => shown.turn(1),
  KeyC: () => shown.compare(),
  KeyP: () => shown.explain?.(),
};

function keys(event) {
  const typing = event.target.closest("input, textarea, [contenteditable]:not([contenteditable=false])");
  if (document.querySelector("dialog[open]")) return;
  if (event.altKey && !event.ctrlKey && ALT_KEYS[event.code]) ALT_KEYS[event.code]();
  else if (event.key === "Escape" && runs.isRunning()) runs.stop();
  else if (event.key === "Escape") { tokens.close(); if (isNarrow()) drawers(null); }
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !runs.isRunning()) shown.go();
  else if (event.key === "?" && !typing) byId("help").showModal();
  else return;
  event.preventDefault();
}

start();
