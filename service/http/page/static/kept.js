// Finished runs are kept across reloads, per tab: the newest ones that fit into the browser's storage.

import { store, stored, unstore } from "./storage.js";

const SLOT = "iddpm.runs";

/** @returns {{request: object, model: object, answer: object}[]} newest first */
export function keptRuns() {
  return JSON.parse(stored(SLOT)) ?? [];
}

/** Keep one more run; one that is too large by itself, as with a large picture, is not kept. */
export function keepRun(run) {
  const runs = [run, ...keptRuns()];
  while (runs.length && !store(SLOT, JSON.stringify(runs))) runs.pop();
}

/** Remove all kept runs. */
export function forgetRuns() {
  unstore(SLOT);
}
