// The answers that are being written: start several at once, stop them, and say so.

import * as answers from "./answers.js";

let controller = null;

/** Whether answers are being written. */
export const isRunning = () => controller !== null;

/** Stop all answers; what they have so far is kept. */
export function stop() {
  controller?.abort();
  controller = null;
}

/**
 * Write answers at once. Each task is {path, body, fromChoice, answer, piece}; `fields`, or a promise of them, are added
 * to every body. Returns after the last one, with the first error or null; an answer that failed has the reason "error".
 */
export async function write(tasks, fields, changed) {
  const own = new AbortController();
  controller = own;
  changed();
  let failure = null;
  const one = async ({ path, body, fromChoice, answer, piece }) => {
    try {
      await answers.run(path, { ...body, ...(await fields) }, fromChoice, answer, own.signal, piece);
    } catch (error) {
      answer.reason = "error";
      failure ??= error;
    }
  };
  await Promise.all(tasks.map(one));
  if (controller === own) controller = null;
  changed();
  return failure;
}
