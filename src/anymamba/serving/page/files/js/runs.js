// The answers that are being written: start several at once, stop them, and say so.

import * as answers from "./answers.js";

let controller = null;

/** Whether answers are being written. */
export const isRunning = () => controller !== null;

/** Stop all answers; what they have so far is kept. */
export const stop = () => controller?.abort();

/**
 * Write answers at once. Each task is {path, body, fromChoice, answer, piece}. Returns after the last one, with the
 * first error or null; an answer that failed has the reason "error".
 */
export async function write(tasks, changed) {
  controller = new AbortController();
  changed();
  let failure = null;
  const one = async ({ path, body, fromChoice, answer, piece }) => {
    try {
      await answers.run(path, body, fromChoice, answer, controller.signal, piece);
    } catch (error) {
      answer.reason = "error";
      failure ??= error;
    }
  };
  await Promise.all(tasks.map(one));
  controller = null;
  changed();
  return failure;
}
