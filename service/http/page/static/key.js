// The API key, where the service asks for one: kept by this tab, forgotten with it.

import { byId } from "./dom.js";

const SLOT = "iddpm.key";
let asking = null;

/** The header that proves who we are; empty while nobody has asked. */
export function authorization() {
  const key = sessionStorage.getItem(SLOT);
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Whether requests carry a key. */
export function hasKey() {
  return sessionStorage.getItem(SLOT) !== null;
}

/**
 * Ask for a key; all who need one meanwhile wait for the same answer.
 * @param {Record<string, string>} refused - the header that was not enough
 * @returns {Promise<boolean>} whether there is another one to try
 */
export function askForKey(refused) {
  if (refused.Authorization !== authorization().Authorization) return Promise.resolve(true); // entered meanwhile
  asking ??= ask(Boolean(refused.Authorization)).finally(() => (asking = null));
  return asking;
}

function ask(wasWrong) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = wasWrong
    ? "The key was not accepted. Is it complete, and still valid?"
    : "Whoever runs it can give you one.";
  field.value = "";
  dialog.returnValue = "cancel"; // what Escape means
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use";
        if (given) sessionStorage.setItem(SLOT, field.value.trim());
        field.value = "";
        resolve(given);
      },
      { once: true },
    );
  });
}
