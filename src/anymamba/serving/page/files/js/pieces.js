// Text in pieces. A piece is {text} for text that was typed, or {text, scores} for text that the model wrote;
// a score is {token, p, top: [[token, p], ...]}, with probabilities from 0 to 1.

/** The text of all pieces. */
export const textOf = (pieces) => pieces.map((piece) => piece.text).join("");

/** The pieces of the first `length` characters. A piece that is cut loses its scores. */
export function cut(pieces, length) {
  const kept = [];
  for (const piece of pieces) {
    if (length <= 0) break;
    kept.push(piece.text.length <= length ? piece : { text: piece.text.slice(0, length) });
    length -= piece.text.length;
  }
  return kept;
}

/** The pieces of a text after an edit: what did not change keeps its scores. */
export function edited(pieces, text) {
  const old = textOf(pieces);
  if (old === text) return pieces;
  const limit = Math.min(old.length, text.length);
  let start = 0;
  while (start < limit && old[start] === text[start]) start++;
  let end = 0;
  while (end < limit - start && old[old.length - 1 - end] === text[text.length - 1 - end]) end++;
  const middle = { text: text.slice(start, text.length - end) };
  return joined([...cut(pieces, start), middle, ...tail(pieces, old.length - end)]);
}

/** The pieces after the first `length` characters. */
function tail(pieces, length) {
  const kept = [];
  for (const piece of pieces) {
    if (length <= 0) kept.push(piece);
    else if (piece.text.length > length) kept.push({ text: piece.text.slice(length) });
    length -= piece.text.length;
  }
  return kept;
}

/** Pieces without empty ones, with typed text that is beside typed text in one piece. */
function joined(pieces) {
  const result = [];
  for (const piece of pieces) {
    const last = result.at(-1);
    if (!piece.text) continue;
    if (last && !last.scores && !piece.scores) result[result.length - 1] = { text: last.text + piece.text };
    else result.push(piece);
  }
  return result;
}

/** Add what arrived to pieces that grow. Tokens without text of their own belong to the next text. */
export function grow(pieces, { text, scores }) {
  const last = pieces.at(-1);
  if (last && last.scores && !last.text) pieces[pieces.length - 1] = { text, scores: [...last.scores, ...scores] };
  else if (text || scores.length) pieces.push({ text, scores });
}

/** How much two texts have in common at their beginning. */
export function commonLength(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n;
}

/** What a choice of /v1/completions brings. */
export function fromCompletion(choice) {
  const found = choice.logprobs;
  const scores = (found?.tokens ?? []).map((token, i) => ({
    token,
    p: Math.exp(found.token_logprobs[i]),
    top: Object.entries(found.top_logprobs?.[i] ?? {}).map(([t, l]) => [t, Math.exp(l)]).sort((a, b) => b[1] - a[1]),
  }));
  return { text: choice.text ?? "", scores };
}

/** What a choice of /v1/chat/completions brings. */
export function fromChat(choice) {
  const scores = (choice.logprobs?.content ?? []).map((entry) => ({
    token: entry.token,
    p: Math.exp(entry.logprob),
    top: (entry.top_logprobs ?? []).map((t) => [t.token, Math.exp(t.logprob)]),
  }));
  return { text: choice.delta?.content ?? "", scores };
}
