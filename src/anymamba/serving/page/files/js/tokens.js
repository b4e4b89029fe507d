// Text with a span for each piece, and the card that tells how likely a token was.

import { byId, h } from "./dom.js";

const PART = /^bytes:(\\x[0-9a-f]{2})+$/; // a token that is only a part of a character
const LEVELS = [0.9, 0.6, 0.3, 0.1]; // probabilities above which a token is "sure", ... and below the last "odd"
let current = null; // the span that the card is about
let choose = null; // what a click on another token does

/** A span for one piece. */
export function span(piece) {
  if (!piece.scores?.length) return h("span", {}, piece.text);
  const p = Math.min(...piece.scores.map((score) => score.p));
  const level = LEVELS.findIndex((limit) => p >= limit);
  const element = h("span", { class: `token level-${level < 0 ? LEVELS.length : level}` }, piece.text);
  element.scores = piece.scores;
  return element;
}

/** Show pieces in an element. */
export function show(element, pieces) {
  element.replaceChildren(...pieces.map(span));
}

/**
 * Tell probabilities on hover, tap, and with the arrow keys where the element has the focus; Enter goes into the card.
 * `branch(span, token)`, if given, goes on from another token that was likely in that place.
 */
export function explain(element, branch = null) {
  element.addEventListener("pointerover", (event) => event.target.scores && open(event.target, branch));
  element.addEventListener("pointerleave", (event) => event.relatedTarget?.closest?.("#token-card") || close());
  element.addEventListener("click", (event) => event.target.scores && open(event.target, branch));
  element.addEventListener("keydown", (event) => {
    if (element.isContentEditable || event.altKey) return;
    if (event.key === "Enter" && current && !event.ctrlKey && !event.metaKey) {
      byId("token-card").querySelector("button")?.focus();
      event.preventDefault();
    }
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const tokens = [...element.querySelectorAll(".token")];
    const place = tokens.indexOf(current) + (event.key === "ArrowRight" ? 1 : -1);
    if (tokens[place]) open(tokens[place], branch);
    event.preventDefault();
  });
  element.addEventListener("blur", (event) => event.relatedTarget?.closest("#token-card") || close());
}

/** Hide the card. */
export function close() {
  current?.classList.remove("current");
  current = null;
  byId("token-card").hidden = true;
}

/** Open the card for a span; with `focus` its first button gets the focus. */
export function open(element, branch, focus = false) {
  if (current === element) return;
  close();
  current = element;
  choose = branch;
  element.classList.add("current");
  const card = byId("token-card");
  const score = element.scores.at(-1);
  const others = score.top.some(([token]) => token === score.token) ? score.top : [[score.token, score.p], ...score.top];
  card.replaceChildren(...element.scores.slice(0, -1).map((part) => line(part.token, part.p, true)), ...others.map(([token, p]) => line(token, p, token === score.token)));
  card.append(h("small", {}, `Log-probability ${Math.log(score.p).toFixed(2)}`));
  if (card.querySelector("button")) card.append(h("small", {}, "Click another token to go on from it."));
  card.hidden = false;
  place(card, element.getClientRects()[0] ?? element.getBoundingClientRect());
  if (focus) card.querySelector("button")?.focus();
}

function line(token, p, chosen) {
  const bar = h("span", { class: "bar" });
  bar.style.width = `${Math.max(1, 100 * p)}%`;
  const parts = [h("code", {}, shown(token)), h("span", { class: "percent" }, percent(p)), bar];
  if (chosen || !choose || PART.test(token)) return h("div", { class: chosen ? "line chosen" : "line" }, ...parts);
  const go = choose;
  const from = current;
  return h("button", { type: "button", class: "line", onclick: () => { close(); go(from, token); } }, ...parts);
}

const percent = (p) => (p >= 0.001 || p === 0 ? `${(100 * p).toFixed(1)} %` : "< 0.1 %");
const shown = (token) => token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";

function place(card, box) {
  const left = Math.max(8, Math.min(box.left, innerWidth - card.offsetWidth - 8));
  const below = box.bottom + 6 + card.offsetHeight < innerHeight;
  card.style.left = `${left}px`;
  card.style.top = `${below ? box.bottom + 4 : Math.max(8, box.top - card.offsetHeight - 4)}px`;
}

/** Close the card when the pointer leaves it. A click in it leaves the focus in the text. */
export function start() {
  byId("token-card").addEventListener("pointerleave", close);
  byId("token-card").addEventListener("mousedown", (event) => event.preventDefault());
  document.addEventListener("scroll", close, true);
}
