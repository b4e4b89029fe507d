// The settings: a form made from a table, kept in localStorage.

import { byId, h } from "./dom.js";

const KEPT = "anymamba-settings";

/** name, label, start value, kind, and attributes of the input. An empty number is not sent. */
const FIELDS = [
  ["max_tokens", "Longest answer", 256, "number", { min: 1, step: 1 }, "tokens"],
  ["temperature", "Temperature", 0.8, "range", { min: 0, max: 2, step: 0.05 }, "0 takes the likeliest token"],
  ["top_p", "Top p", 1, "range", { min: 0.05, max: 1, step: 0.01 }, "the likeliest tokens that hold this probability"],
  ["min_p", "Min p", 0, "range", { min: 0, max: 1, step: 0.01 }, "tokens at least this likely, against the likeliest"],
  ["top_k", "Top k", "", "number", { min: 1, step: 1 }, "the k likeliest tokens"],
  ["repetition_penalty", "Repetition penalty", "", "number", { min: 0.01, step: 0.05 }, "above 1 avoids what occurred"],
  ["frequency_penalty", "Frequency penalty", "", "number", { min: -2, max: 2, step: 0.1 }, ""],
  ["presence_penalty", "Presence penalty", "", "number", { min: -2, max: 2, step: 0.1 }, ""],
  ["seed", "Seed", "", "number", { step: 1 }, "of the first version; each further one counts up"],
  ["stop", "Stop at", "", "lines", {}, "one text a line, up to four"],
  ["answers", "Answers at once", 1, "number", { min: 1, max: 4, step: 1 }, "to compare"],
  ["colour", "Colour tokens by probability", false, "check", {}, ""],
  ["mono", "Letters of one width, for code", false, "check", {}, ""],
];
const LOCAL = new Set(["answers", "colour", "mono"]);

/** Make the form. `changed` is called after each change. */
export function start(changed) {
  const form = byId("settings-form");
  const kept = read();
  form.append(h("h2", {}, "Settings"), ...FIELDS.map((field) => row(field, kept[field[0]] ?? field[2])));
  form.append(h("button", { type: "button", onclick: () => reset(form, changed) }, "Reset"));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    showNumbers(form);
    localStorage.setItem(KEPT, JSON.stringify(values()));
    changed();
  });
  showNumbers(form);
}

/** The settings as they are, by name. */
export function values() {
  const found = {};
  for (const [name, , , kind] of FIELDS) {
    const input = byId(`set-${name}`);
    found[name] = kind === "check" ? input.checked : input.value;
  }
  return found;
}

/** The fields of a request. */
export function requestFields() {
  const body = {};
  for (const [name, , , kind] of FIELDS) {
    const value = byId(`set-${name}`).value;
    if (LOCAL.has(name) || value === "") continue;
    body[name] = kind === "lines" ? value.split("\n").filter((line) => line !== "") : Number(value);
  }
  return body;
}

/** How many answers to ask for at once. */
export const nAnswers = () => Math.min(4, Math.max(1, Math.floor(Number(values().answers)) || 1));

function row([name, label, , kind, attributes, hint], value) {
  const id = `set-${name}`;
  const input = kind === "lines" ? h("textarea", { id, rows: 2 }) : h("input", { id, type: kind === "check" ? "checkbox" : kind, ...attributes });
  if (kind === "check") input.checked = value === true;
  else input.value = value;
  const output = kind === "range" && h("output", { for: id });
  const note = hint && h("small", { id: `${id}-hint` }, hint);
  if (note) input.setAttribute("aria-describedby", note.id);
  return h("div", { class: `setting ${kind}` }, h("label", { for: id }, label), output, input, note);
}

function showNumbers(form) {
  for (const output of form.querySelectorAll("output")) output.value = byId(output.htmlFor.value).value;
}

function reset(form, changed) {
  localStorage.removeItem(KEPT);
  for (const [name, , value, kind] of FIELDS) {
    const input = byId(`set-${name}`);
    if (kind === "check") input.checked = value;
    else input.value = value;
  }
  showNumbers(form);
  changed();
}

function read() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}
