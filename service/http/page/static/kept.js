// Finished runs are kept across reloads, per tab: the newest ones that fit into the browser's storage.

const SLOT = "iddpm.runs";

/** @returns {{request: object, model: object, answer: object}[]} newest first */
export function keptRuns() {
  return JSON.parse(sessionStorage.getItem(SLOT)) ?? [];
}

/** Keep one more run; one that is too large by itself, as with a large picture, is not kept. */
export function keepRun(run) {
  const runs = [run, ...keptRuns()];
  while (runs.length) {
    try {
      sessionStorage.setItem(SLOT, JSON.stringify(runs));
      return;
    } catch (error) {
      if (error.name !== "QuotaExceededError") throw error;
      runs.pop();
    }
  }
}

/** Remove all kept runs. */
export function forgetRuns() {
  sessionStorage.removeItem(SLOT);
}
