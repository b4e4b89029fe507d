// What is told beside and below the text: the cost of an answer, its end, and errors.

import { byId, count, h, iconButton, plural } from "./dom.js";

/** "128 tokens · 412 tokens/s · first after 0.02 s · 1,190 of 1,204 prompt tokens remembered". */
export function cost({ tokens, perSecond, firstAfter, prompt, cached }) {
  const parts = [plural(tokens, "token")];
  if (perSecond) parts.push(`${count(Math.round(perSecond))} tokens/s`);
  if (firstAfter != null) parts.push(`first after ${firstAfter.toFixed(2)} s`);
  if (prompt) parts.push(`${count(cached)} of ${plural(prompt, "prompt token")} remembered`);
  return parts.join(" · ");
}

const REASONS = { length: "limit reached", stopped: "stopped by you", error: "broken off by an error" };

/** Why an answer ended, where that is worth telling. */
export const ending = (reason) => REASONS[reason] ?? "";

/** Show an error until it is closed. `ways` are [label, call] of buttons that help. */
export function complain(message, ways = []) {
  const notice = byId("notice");
  const buttons = ways.map(([label, call]) => h("button", { type: "button", onclick: () => { clear(); call(); } }, label));
  notice.replaceChildren(h("span", {}, message), ...buttons, iconButton("close", "Close", clear));
  notice.hidden = false;
}

/** Take the error away. */
export function clear() {
  byId("notice").hidden = true;
}
