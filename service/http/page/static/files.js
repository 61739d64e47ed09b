// Images as bytes, and their downloads.

import { channelsUrl, meanUrl } from "./arrays.js";

/** Decode base64. */
export function bytesOf(b64) {
  return Uint8Array.from(atob(b64), (character) => character.charCodeAt(0));
}

/** Encode a file in base64. */
export function base64Of(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Return the URL of an image that was received as base64: of an array, the channels beside each other. */
export function pictureUrl(b64, format = "png") {
  return isArray(b64) ? channelsUrl(bytesOf(b64)) : `data:image/${format};base64,${b64}`;
}

/** Return the URL of an image in its own size: of an array, the mean of the channels. */
export function onePictureUrl(b64) {
  return isArray(b64) ? meanUrl(bytesOf(b64)) : pictureUrl(b64);
}

/** Return whether a file in base64 is an npy or npz. */
export function isArray(b64) {
  return b64.startsWith("k05VTVBZ") || b64.startsWith("UEs"); // "\x93NUMPY", and "PK" of zip archives
}

/** Return a file name of letters, digits and hyphens for any class name; `image` is that of the service's answer. */
export function fileName(image) {
  const readable = (image.class ?? "").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40);
  const extension = isArray(image.b64_json) ? "npy" : "png";
  return `${[readable, `seed${image.seed}`, image.image_index].filter((part) => part !== "").join("-")}.${extension}`;
}

/** Let the browser save a file. */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser may still be reading
}

/**
 * Copy text to the clipboard, and show the result on the button.
 * @param {HTMLButtonElement} button
 * @param {string} text
 */
export async function copy(button, text) {
  const label = (button.dataset.label ??= button.textContent); // it may show the result of the last copy
  try {
    await navigator.clipboard.writeText(text); // undefined unless the page was loaded by HTTPS or from this machine
    button.textContent = "Copied";
  } catch {
    button.textContent = "Not allowed here";
    button.title = "Browsers let pages copy over HTTPS and on localhost only. A picture's details show its code.";
  }
  setTimeout(() => (button.textContent = label), 1500);
}
