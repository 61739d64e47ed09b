// Requests of the page to the service. Addresses are relative, because a proxy may serve the page under a prefix.

import { askForKey, authorization } from "./key.js";

/** An error answer; `detail` and `errors`, [{field, message}], are those of the problem. */
export class Refusal extends Error {
  constructor(status, detail, retryAfter, errors = []) {
    super(detail);
    this.name = "Refusal";
    this.status = status;
    this.detail = detail;
    this.retryAfter = retryAfter;
    this.errors = errors ?? [];
  }
}

/**
 * Fetch, with the key if there is one.
 * @param {string} path
 * @param {RequestInit & {background?: boolean}} options - background: do not ask the user for a key
 * @returns {Promise<Response>} an answer with a status of success
 * @throws {Refusal} for any other answer
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

/** Request images: one answer, or with `stream` events about their progress. */
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
  return new Refusal(answer.status, problem.detail ?? answer.statusText, retryAfter, problem.errors);
}
