// Texts that outlive a reload of the page. A browser may forbid storage, or have no space left; then the page goes on
// without, and what it shows is the same until it is reloaded.

/**
 * Return a stored text, or null.
 * @param {string} slot
 * @param {"sessionStorage" | "localStorage"} storage - of this tab, or of all tabs
 */
export function stored(slot, storage = "sessionStorage") {
  try {
    return window[storage].getItem(slot);
  } catch {
    return null;
  }
}

/** Store a text; return whether that is allowed and there was space. Otherwise the slot keeps the text it had. */
export function store(slot, text, storage = "sessionStorage") {
  try {
    window[storage].setItem(slot, text);
    return true;
  } catch {
    return false;
  }
}

/** Remove a stored text of this tab. */
export function unstore(slot) {
  try {
    sessionStorage.removeItem(slot);
  } catch {} // nothing is stored where storage is forbidden
}
