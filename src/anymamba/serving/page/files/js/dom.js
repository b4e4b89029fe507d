import { icon } from "./icons.js";

/** Make an element. Attributes that start with "on" are listeners; true and false set or leave out an attribute. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null && child !== false));
  return element;
}

/** The element with an id. */
export const byId = (id) => document.getElementById(id);

/** A button with a symbol and a name that is read out. */
export function iconButton(symbol, name, onclick) {
  return h("button", { type: "button", class: "icon", title: name, onclick }, icon(symbol), h("span", { class: "hidden" }, name));
}

/** A function that calls another one at most once for each picture that the browser draws. */
export function perFrame(call) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; call(); });
  };
}

/** A number with separators, as "12,034". */
export const count = (n) => n.toLocaleString("en-US");

/** "1 token", "2 tokens". */
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
