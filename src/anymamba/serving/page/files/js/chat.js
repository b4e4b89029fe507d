// The chat: messages, each with its versions; any of them can be edited, tried again and compared.

import { h, iconButton, perFrame } from "./dom.js";
import { fromChat, textOf } from "./pieces.js";
import * as runs from "./runs.js";
import * as settings from "./settings.js";
import * as status from "./status.js";
import * as tokens from "./tokens.js";
import * as tree from "./tree.js";

/** Show a chat in `view` and its input in `composer`. `app` has save(), refresh(), fail(error) and requestFields(conversation). */
export function open(conversation, view, composer, app) {
  const chat = conversation.tree;
  const input = h("textarea", { id: "input", rows: 1, placeholder: "Write a message", "aria-label": "Message" });
  const button = h("button", { type: "submit", class: "main" });
  const form = h("form", { class: "input-row" }, input, button);
  const system = h("textarea", { id: "system", rows: 2, "aria-label": "System message", placeholder: "What the model is to be or do (optional)" });
  const list = h("div", { class: "messages" });
  let closed = false;
  let comparing = null; // the parent whose answers are side by side

  form.addEventListener("submit", (event) => { event.preventDefault(); runs.isRunning() ? runs.stop() : send(); });
  input.addEventListener("keydown", (event) => {
    const plain = event.key === "Enter" && !event.shiftKey && !event.isComposing;
    if (plain && (event.ctrlKey || event.metaKey || matchMedia("(pointer: fine)").matches)) { event.preventDefault(); form.requestSubmit(); }
  });
  input.addEventListener("input", () => grown(input));
  system.value = conversation.system ?? "";
  system.addEventListener("change", () => { conversation.system = system.value; app.save(); });
  composer.replaceChildren(form);
  view.replaceChildren(h("details", { class: "system", open: Boolean(system.value) }, h("summary", {}, "System message"), system), list);

  async function send() {
    const text = input.value;
    if (!text.trim() || runs.isRunning()) return;
    const leaf = chat.leaf;
    tree.add(chat, leaf, "user", [{ text }]);
    conversation.title ||= text.trim().slice(0, 60);
    input.value = "";
    grown(input);
    await answer(chat.leaf);
  }

  /** Write one or several answers to a message; `start` has the pieces of an answer to go on with. */
  async function answer(question, start = []) {
    comparing = null;
    const fields = settings.requestFields();
    const nodes = Array.from({ length: settings.nAnswers() }, () => tree.add(chat, question, "assistant", [...start]));
    const messages = tree.path(chat, question).map((node) => ({ role: node.role, content: textOf(node.pieces) }));
    if (conversation.system?.trim()) messages.unshift({ role: "system", content: conversation.system });
    if (start.length) messages.push({ role: "assistant", content: textOf(start) });
    const goingOn = start.length ? { continue_final_message: true, add_generation_prompt: false } : {};
    const { max_tokens, seed, ...rest } = fields;
    const first = seed + tree.siblings(chat, nodes[0]).indexOf(nodes[0]);
    const body = { ...rest, ...goingOn, messages, max_completion_tokens: max_tokens, logprobs: true, top_logprobs: 5 };
    if (nodes.length > 1) comparing = question;
    chat.leaf = nodes[0].id;
    draw(true);
    const tasks = nodes.map((node, i) => ({
      path: "chat/completions",
      body: seed == null ? body : { ...body, seed: first + i },
      fromChoice: fromChat,
      answer: node,
      piece: perFrame(() => update(node)),
    }));
    const failure = await runs.write(tasks, app.requestFields(conversation), drawButton);
    for (const node of nodes) if (node.reason === "error" && node.pieces.length === start.length) tree.drop(chat, node);
    if (failure && !closed) app.fail(failure);
    draw(isAtEnd());
    app.save();
    app.refresh();
  }

  /** Go on with another token in the place of one of an answer; the old answer stays as a version. */
  function goFrom(node, span, token) {
    if (runs.isRunning()) return;
    const place = [...span.parentElement.childNodes].indexOf(span);
    answer(node.parent, [...node.pieces.slice(0, place), { text: token }]);
  }

  /** Draw all messages; the view stays where it is, or goes to the end. */
  function draw(toEnd = false) {
    if (closed) return;
    const place = view.scrollTop;
    const messages = tree.path(chat);
    const at = comparing == null ? -1 : messages.findIndex((node) => node.parent === comparing);
    const shown = at < 0 ? messages.map(message) : [...messages.slice(0, at).map(message), columns(tree.siblings(chat, messages[at]))];
    list.replaceChildren(...shown);
    if (!messages.length) list.append(h("p", { class: "empty" }, "Ask something. Every message can be edited later, and the answer goes on from there at once."));
    drawButton();
    view.scrollTop = toEnd ? view.scrollHeight : place;
  }

  const isAtEnd = () => view.scrollHeight - view.scrollTop - view.clientHeight < 80;

  function columns(nodes) {
    const each = (node) => h("div", { class: "column" }, message(node), h("button", { type: "button", onclick: () => { comparing = null; tree.select(chat, node.id); draw(); app.save(); } }, "Go on with this one"));
    return h("div", { class: "columns", role: "group", "aria-label": "Answers side by side" }, ...nodes.map(each));
  }

  function message(node) {
    const text = h("div", { class: "text", tabindex: node.role === "assistant" ? 0 : false, "aria-label": node.role === "assistant" ? "Answer" : "Your message" });
    tokens.show(text, node.pieces);
    tokens.explain(text, node.role === "assistant" ? (span, token) => goFrom(node, span, token) : null);
    const meta = h("div", { class: "meta" }, h("span", { class: "cost" }, told(node)), h("span", { class: "nav" }, ...actions(node)));
    return h("article", { class: `message ${node.role}`, "data-id": node.id }, text, meta);
  }

  function actions(node) {
    const versions = tree.siblings(chat, node);
    const found = [];
    if (versions.length > 1) {
      found.push(turner(node, -1), h("span", { class: "version" }, `${versions.indexOf(node) + 1}/${versions.length}`), turner(node, 1));
      found.push(iconButton("compare", "Compare versions", () => compare(node)));
    }
    const isUnanswered = node.role === "user" && !chat.nodes.some((other) => other.parent === node.id);
    if (isUnanswered) found.push(iconButton("again", "Send again", () => !runs.isRunning() && answer(node.id)));
    if (node.role === "assistant") found.push(iconButton("again", "Try again", () => !runs.isRunning() && answer(node.parent)));
    found.push(iconButton("copy", "Copy", () => navigator.clipboard?.writeText(textOf(node.pieces))));
    found.push(iconButton("edit", node.role === "user" ? "Edit and send from here" : "Edit this answer", () => edit(node)));
    return found;
  }

  const turner = (node, by) => iconButton(by < 0 ? "earlier" : "later", by < 0 ? "Earlier version" : "Later version", () => turn(node, by));

  function turn(node, by) {
    const versions = tree.siblings(chat, node);
    const other = versions[versions.indexOf(node) + by];
    if (!other || runs.isRunning()) return;
    comparing = null;
    tree.select(chat, other.id);
    draw();
    app.save();
  }

  function compare(node) {
    if (tree.siblings(chat, node).length < 2) return;
    comparing = comparing === node.parent ? null : node.parent;
    tree.select(chat, node.id);
    draw();
  }

  /** Write another version of a message in its place; a question is sent, an answer is kept as it is. */
  function edit(node) {
    if (runs.isRunning()) return;
    const area = h("textarea", { class: "edit", "aria-label": "Edited message" });
    area.value = textOf(node.pieces);
    const done = async () => {
      tree.add(chat, node.parent, node.role, [{ text: area.value }]);
      if (node.role === "user") return answer(chat.leaf);
      draw();
      app.save();
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); event.stopPropagation(); done(); }
      if (event.key === "Escape") { event.stopPropagation(); draw(); }
    });
    const main = h("button", { type: "button", class: "main", onclick: done }, node.role === "user" ? "Send" : "Keep");
    const row = h("div", { class: "row" }, main, h("button", { type: "button", onclick: () => draw() }, "Cancel"));
    list.querySelector(`[data-id="${node.id}"]`)?.replaceChildren(area, row);
    grown(area);
    area.focus();
  }

  /** Show what has arrived of an answer. */
  function update(node) {
    const article = list.querySelector(`[data-id="${node.id}"]`);
    if (!article || !runs.isRunning()) return; // after the end all is drawn anew
    const text = article.querySelector(".text");
    const atEnd = isAtEnd();
    while (text.childNodes.length > Math.max(0, node.pieces.length - 2)) text.lastChild.remove();
    text.append(...node.pieces.slice(text.childNodes.length).map(tokens.span));
    article.querySelector(".cost").textContent = told(node);
    if (atEnd) view.scrollTop = view.scrollHeight;
  }

  const told = (node) => [node.stats && status.cost(node.stats), status.ending(node.reason)].filter(Boolean).join(" · ");

  function drawButton() {
    button.textContent = runs.isRunning() ? "Stop" : "Send";
    button.classList.toggle("stop", runs.isRunning());
  }

  const last = () => tree.path(chat).findLast((node) => node.role === "assistant");
  draw(true);
  return {
    go: () => form.requestSubmit(),
    turn: (by) => last() && turn(last(), by),
    compare: () => last() && compare(last()),
    focus: () => input.focus(),
    close: () => (closed = true),
    isEmpty: () => chat.nodes.length === 0,
  };
}

/** Make a text area as high as its text. */
function grown(area) {
  area.style.height = "auto";
  area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight * 0.4)}px`;
}
