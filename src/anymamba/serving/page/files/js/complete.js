// Completion: one text that can be edited anywhere; the model goes on from the cursor. Every run is a version.

import { h, iconButton, perFrame, plural } from "./dom.js";
import { commonLength, cut, edited, fromCompletion, textOf } from "./pieces.js";
import * as runs from "./runs.js";
import * as settings from "./settings.js";
import * as status from "./status.js";
import * as tokens from "./tokens.js";

/** A text without versions; a version is {pieces, start, reason, stats}, and `start` is where the model began. */
export const emptyText = () => ({ draft: [], versions: [], current: null });

/** Show a text in `view` and its buttons in `composer`. `app` is as for the chat. */
export function open(conversation, view, composer, app) {
  const text = conversation.text;
  const page = h("div", { id: "input", class: "page", role: "textbox", "aria-multiline": "true", "aria-label": "Text", contenteditable: "plaintext-only", spellcheck: "false", "data-placeholder": "Begin a text. The model goes on from the cursor." });
  if (page.contentEditable !== "plaintext-only") page.contentEditable = "true";
  const button = h("button", { type: "button", class: "main", onclick: () => (runs.isRunning() ? runs.stop() : go()) });
  const again = iconButton("again", "Another version", () => tryAgain());
  const meta = h("span", { class: "cost" });
  const nav = h("span", { class: "nav" });
  let closed = false;
  let comparing = false;
  let caret = null; // where the cursor is in the text; null: at its end

  page.addEventListener("input", () => { text.draft = edited(text.draft, read()); noteCaret(); drawBar(); later(); });
  page.addEventListener("paste", (event) => { event.preventDefault(); insert(event.clipboardData.getData("text/plain")); });
  document.onselectionchange = () => page.isConnected && noteCaret() && label();
  composer.replaceChildren(h("div", { class: "bar" }, button, again, nav, meta));
  tokens.explain(page, (span, token) => goFrom(offsetOf(span), token));

  let timer = 0;
  function later() {
    clearTimeout(timer);
    timer = setTimeout(app.save, 400);
  }

  const read = () => page.textContent;
  const current = () => text.versions[text.current] ?? null;

  function insert(string) {
    const selection = getSelection();
    const range = selection.getRangeAt(0);
    range.deleteContents();
    range.insertNode(document.createTextNode(string));
    range.collapse(false);
    page.dispatchEvent(new InputEvent("input"));
  }

  /** Remember where the cursor is. Returns whether it is in the text. */
  function noteCaret() {
    const selection = getSelection();
    if (!selection.rangeCount || !page.contains(selection.focusNode)) return false;
    const range = document.createRange();
    range.selectNodeContents(page);
    range.setEnd(selection.focusNode, selection.focusOffset);
    const offset = range.toString().length;
    caret = offset >= read().length ? null : offset;
    return true;
  }

  function offsetOf(span) {
    const range = document.createRange();
    range.selectNodeContents(page);
    range.setEndBefore(span);
    return range.toString().length;
  }

  /** Go on from the cursor, or from the end. */
  const go = () => write(caret == null ? text.draft : cut(text.draft, caret));

  /** Go on with another token in the place of one that was chosen. */
  const goFrom = (offset, token) => !runs.isRunning() && write([...cut(text.draft, offset), { text: token }]);

  /** Tell the probabilities of the token at the cursor. */
  function explain() {
    const node = getSelection().focusNode;
    const at = node && page.contains(node) && node !== page ? (node.nodeType === Node.TEXT_NODE ? node.parentElement : node) : null;
    const after = getSelection().focusOffset === at?.textContent.length ? at.nextSibling : null;
    const span = after?.scores ? after : at;
    if (span?.scores) tokens.open(span, (from, token) => goFrom(offsetOf(from), token), true);
  }

  const tryAgain = () => current() && !runs.isRunning() && write(cut(current().pieces, current().start));

  async function write(prompt) {
    const string = textOf(prompt);
    if (runs.isRunning()) return;
    keepEdits();
    const { seed, ...fields } = settings.requestFields();
    const body = { ...fields, prompt: string, logprobs: 5 };
    const first = seed + text.versions.filter((version) => version.stats && textOf(version.pieces).slice(0, version.start) === string).length;
    const made = Array.from({ length: settings.nAnswers() }, () => ({ pieces: [...prompt], start: string.length, reason: null, stats: null }));
    text.versions.push(...made);
    text.current = text.versions.length - made.length;
    text.draft = made[0].pieces;
    comparing = made.length > 1;
    conversation.title ||= string.trim().slice(0, 60);
    caret = null;
    draw();
    const tasks = made.map((version, i) => ({
      path: "completions",
      body: seed == null ? body : { ...body, seed: first + i },
      fromChoice: fromCompletion,
      answer: version,
      piece: perFrame(() => update(version)),
    }));
    const failure = await runs.write(tasks, app.requestFields(conversation), drawBar);
    const failed = made.filter((version) => version.reason === "error" && version.pieces.length === prompt.length);
    text.versions = text.versions.filter((version) => !failed.includes(version));
    text.current = text.versions.length ? Math.min(text.current, text.versions.length - 1) : null;
    text.draft = failed.includes(made[0]) ? prompt : [...made[0].pieces];
    if (failure && !closed) app.fail(failure);
    draw();
    if (!closed) toEnd();
    app.save();
    app.refresh();
  }

  /** An edited text becomes a version of its own, so that it is not lost. */
  function keepEdits() {
    if (current() && textOf(current().pieces) !== textOf(text.draft)) {
      text.versions.push({ pieces: text.draft, start: commonLength(textOf(current().pieces), textOf(text.draft)), reason: null, stats: null });
      text.current = text.versions.length - 1;
    }
  }

  function update(version) {
    const target = comparing ? view.querySelector(`[data-version="${text.versions.indexOf(version)}"]`) : version === current() ? page : null;
    if (!target || !runs.isRunning()) return; // after the end all is drawn anew
    const from = comparing ? target.before : 0;
    const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 80;
    const pieces = version.pieces.slice(from);
    while (target.childNodes.length > Math.max(0, pieces.length - 2)) target.lastChild.remove();
    target.append(...pieces.slice(target.childNodes.length).map(tokens.span));
    meta.textContent = told(version);
    if (atEnd) view.scrollTop = view.scrollHeight;
  }

  function draw() {
    if (closed) return;
    if (comparing) view.replaceChildren(columns());
    else {
      tokens.show(page, text.draft);
      page.contentEditable = runs.isRunning() ? "false" : page.contentEditable;
      view.replaceChildren(page);
    }
    drawBar();
    view.scrollTop = view.scrollHeight;
  }

  /** The versions that go on from the same text, or all if this one is alone. */
  function rivals() {
    const own = current();
    const prompt = textOf(own.pieces).slice(0, own.start);
    const same = text.versions.filter((version) => version.start === own.start && textOf(version.pieces).startsWith(prompt));
    return same.length > 1 ? same : text.versions;
  }

  function columns() {
    const versions = rivals();
    const texts = versions.map((version) => textOf(version.pieces));
    const start = texts.reduce((least, string) => Math.min(least, commonLength(string, texts[0])), Math.min(...versions.map((version) => version.start)));
    const common = h("p", { class: "common" }, start > 400 ? "…" + texts[0].slice(start - 400, start) : texts[0].slice(0, start));
    const each = (version) => {
      const before = cut(version.pieces, start);
      const body = h("div", { class: "text", tabindex: 0, "data-version": text.versions.indexOf(version), "aria-label": "Version" });
      body.before = before.length;
      tokens.show(body, textOf(before).length === start ? version.pieces.slice(before.length) : []);
      if (!body.childNodes.length) body.textContent = texts[versions.indexOf(version)].slice(start);
      tokens.explain(body);
      const choose = h("button", { type: "button", onclick: () => pick(text.versions.indexOf(version)) }, "Go on with this one");
      return h("div", { class: "column" }, body, h("div", { class: "meta" }, told(version)), choose);
    };
    return h("div", { class: "compare" }, common, h("div", { class: "columns", role: "group", "aria-label": "Versions side by side" }, ...versions.map(each)));
  }

  function pick(index) {
    if (!text.versions[index] || runs.isRunning()) return;
    keepEdits();
    comparing = false;
    text.current = index;
    text.draft = [...text.versions[index].pieces];
    caret = null;
    draw();
    app.save();
  }

  const turn = (by) => current() && pick(text.current + by);

  function compare() {
    if (text.versions.length < 2 || runs.isRunning()) return;
    keepEdits();
    comparing = !comparing;
    draw();
  }

  function drawBar() {
    if (!runs.isRunning() && !comparing && page.contentEditable === "false") page.contentEditable = "plaintext-only";
    label();
    again.disabled = !current();
    const n = text.versions.length;
    nav.replaceChildren(...(n < 2 ? [] : [iconButton("earlier", "Earlier version", () => turn(-1)), h("span", { class: "version" }, `${text.current + 1}/${n}`), iconButton("later", "Later version", () => turn(1)), iconButton("compare", "Compare versions", compare)]));
    meta.textContent = current() ? told(current()) : plural(read().length, "character");
  }

  function label() {
    button.textContent = runs.isRunning() ? "Stop" : caret == null ? "Continue" : "Continue from the cursor";
    button.classList.toggle("stop", runs.isRunning());
  }

  const told = (version) => [version.stats && status.cost(version.stats), status.ending(version.reason)].filter(Boolean).join(" · ");

  function toEnd() {
    page.focus();
    getSelection().selectAllChildren(page);
    getSelection().collapseToEnd();
  }

  draw();
  return { go: () => button.click(), turn, compare, explain, close: () => (closed = true), focus: () => page.focus(), isEmpty: () => !read() && !text.versions.length };
}
