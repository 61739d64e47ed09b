// A picture before and after: one over the other with a border that moves, and a map of the differences.

import { byId } from "./dom.js";
import { isArray, pictureUrl } from "./files.js";
import { showPicture } from "./pictures.js";
import { showSlider } from "./sliders.js";

/** Set up the controls; call it once. */
export function installCompare() {
  byId("views").addEventListener("change", showView);
  byId("split").addEventListener("input", showSplit);
}

/**
 * Offer the comparison of the picture that the dialog shows.
 * @param {object} body - of its request: it may begin with a picture, or be conditioned on one
 * @param {string} after - base64 of the result
 */
export async function compare({ image, cond, fit }, after) {
  const before = image ?? cond;
  const view = byId("view");
  view.hidden = image === undefined && (cond === undefined || isArray(cond));
  document.querySelector("input[name=view][value=after]").checked = true;
  byId("view-difference").hidden = image === undefined; // a conditioning image may show something else
  showView();
  if (view.hidden) return;
  showPicture(byId("before-picture"), before, image ? "resize" : fit);
  if (image === undefined) return;
  const sources = [before, after].map((b64) => pictureUrl(b64));
  const images = await Promise.all(sources.map(decoded));
  const difference = differenceOf(...images.map((image) => pixelsOf(image, images[1])));
  drawMap(byId("difference"), difference);
  const largest = largestOf(difference.data);
  const share = difference.data.filter((value) => value > 0).length / difference.shown;
  byId("difference-most").textContent = largest;
  byId("difference-text").textContent = largest
    ? `${(100 * share).toFixed(1)} % of the pixels have changed; black ones are equal bit for bit.`
    : "No pixel has changed.";
}

function showView() {
  const chosen = document.querySelector("input[name=view]:checked").value;
  byId("detail-views").dataset.view = chosen;
  byId("split-field").hidden = chosen !== "compare";
  byId("difference-field").hidden = chosen !== "difference";
  showSplit();
}

function showSplit() {
  const split = byId("split");
  showSlider(split, `${split.value} % before`);
  byId("detail-views").style.setProperty("--split", `${split.value}%`);
}

async function decoded(source) {
  const image = new Image();
  image.src = source;
  await image.decode();
  return image;
}

/** Return a picture exactly, RGBA, row by row; enlarged if it is smaller than the result, as a cascade's first stage is. */
function pixelsOf(image, { naturalWidth, naturalHeight }) {
  const canvas = new OffscreenCanvas(naturalWidth, naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0, naturalWidth, naturalHeight);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/** Return the largest difference of the colours of each pixel, 0..255, and the number of pixels that are not transparent. */
function differenceOf(before, after) {
  const data = new Uint8Array(before.width * before.height);
  for (let k = 0; k < 4 * data.length; k++) {
    const pixel = k >> 2;
    data[pixel] = Math.max(data[pixel], Math.abs(before.data[k] - after.data[k]));
  }
  const shown = data.filter((_, pixel) => after.data[4 * pixel + 3] > 0).length;
  return { width: before.width, height: before.height, data, shown };
}

/** Draw differences: black for none, from dark red to white for others; the style sheet has the same scale. */
function drawMap(canvas, { width, height, data }) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  const most = Math.max(1, largestOf(data));
  data.forEach((value, k) => {
    const heat = value && 0.6 + (2.4 * value) / most; // the smallest is visible
    pixels.data.set([255 * heat, 255 * (heat - 1), 255 * (heat - 2), 255], 4 * k); // clamped to 0..255
  });
  context.putImageData(pixels, 0, 0);
}

function largestOf(values) {
  return values.reduce((largest, value) => Math.max(largest, value), 0); // too many values for arguments of Math.max
}
