// The API key, if the service requires one. It is kept for the lifetime of this tab, or of the page without storage.

import { byId } from "./dom.js";
import { store, stored } from "./storage.js";

const SLOT = "iddpm.key";
let key = stored(SLOT);
let asking = null;

/** Return the header with the key; empty if no key was entered. */
export function authorization() {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

/** Return whether requests have a key. */
export function hasKey() {
  return key !== null;
}

/**
 * Ask the user for a key; concurrent calls share one dialog.
 * @param {Record<string, string>} refused - the header that the service refused
 * @returns {Promise<boolean>} whether there is another key to try
 */
export function askForKey(refused) {
  if (refused.Authorization !== authorization().Authorization) return Promise.resolve(true); // entered in the meantime
  asking ??= ask(Boolean(refused.Authorization)).finally(() => (asking = null));
  return asking;
}

function ask(wasWrong) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = wasWrong
    ? "The key was not accepted. Is it complete, and still valid?"
    : "The operator of the service can give you one.";
  field.value = "";
  dialog.returnValue = "cancel"; // the value for Escape
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use";
        if (given) {
          key = field.value.trim();
          store(SLOT, key);
        }
        field.value = "";
        resolve(given);
      },
      { once: true },
    );
  });
}
