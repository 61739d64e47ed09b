// How the page talks to the service. Addresses are relative: a proxy may serve all of it under a prefix.

import { askForKey, authorization } from "./key.js";

/** An answer that is an error; `detail` is the problem's own. */
export class Refusal extends Error {
  constructor(status, detail, retryAfter) {
    super(detail);
    this.name = "Refusal";
    this.status = status;
    this.detail = detail;
    this.retryAfter = retryAfter;
  }
}

/**
 * Fetch, with the key if there is one.
 * @param {string} path
 * @param {RequestInit & {background?: boolean}} options - background: nobody waits, so ask nobody for a key
 * @returns {Promise<Response>} a good answer
 * @throws {Refusal} any other
 */
export async function call(path, { background = false, headers = {}, ...options } = {}) {
  for (;;) {
    const proof = authorization();
    const answer = await fetch(path, { ...options, headers: { ...headers, ...proof } });
    if (answer.ok) return answer;
    if (answer.status === 401 && !background && (await askForKey(proof))) continue;
    throw await refusal(answer);
  }
}

/** Ask for images whose making is told as events. */
export function generate(body, signal) {
  return call("v1/generate", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

async function refusal(answer) {
  const problem = await answer.json().catch(() => ({}));
  const retryAfter = Number(answer.headers.get("Retry-After")) || null;
  return new Refusal(answer.status, problem.detail ?? answer.statusText, retryAfter);
}
