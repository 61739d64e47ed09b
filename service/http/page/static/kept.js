// Finished runs outlive a reload, in this tab: the newest, as many as the browser has room for.

const SLOT = "iddpm.runs";

/** @returns {{request: object, model: object, answer: object}[]} newest first */
export function keptRuns() {
  return JSON.parse(sessionStorage.getItem(SLOT)) ?? [];
}

/** Keep one more. */
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
  forgetRuns();
}

/** Keep none. */
export function forgetRuns() {
  sessionStorage.removeItem(SLOT);
}
