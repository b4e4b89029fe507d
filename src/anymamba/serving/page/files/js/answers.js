// One run: several answers to the same prompt at once, with what they cost.

import * as api from "./api.js";
import { grow } from "./pieces.js";

/**
 * Ask for an answer and grow `answer.pieces` as it comes. `answer` also gets `reason` and `stats`:
 * {tokens, perSecond, firstAfter (seconds), prompt, cached}. `piece(new piece)` is called for each arrival.
 */
export async function run(path, body, fromChoice, answer, signal, piece) {
  const asked = performance.now();
  let first = null;
  let last = asked;
  let tokens = 0;
  try {
    const options = { ...body, stream_options: { include_usage: true } };
    for await (const event of api.stream(path, options, signal)) {
      for (const choice of event.choices) {
        const arrived = fromChoice(choice);
        if (arrived.text || arrived.scores.length) {
          last = performance.now();
          first ??= last;
          tokens += Math.max(1, arrived.scores.length);
          grow(answer.pieces, arrived);
          answer.stats = stats(asked, first, last, tokens);
          piece();
        }
        answer.reason = choice.finish_reason ?? answer.reason;
      }
      if (event.usage) {
        const { prompt_tokens, completion_tokens, prompt_tokens_details } = event.usage;
        const cached = prompt_tokens_details?.cached_tokens ?? 0;
        answer.stats = { ...stats(asked, first ?? last, last, completion_tokens), prompt: prompt_tokens, cached };
      }
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    answer.reason = "stopped";
  }
}

function stats(asked, first, last, tokens) {
  const seconds = (last - first) / 1000;
  return { tokens, perSecond: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null, firstAfter: (first - asked) / 1000 };
}
