// The images of one run: first noise, then previews, then the results.

import { sidesOfChannels } from "./arrays.js";
import { el } from "./dom.js";
import { isArray, pictureUrl } from "./files.js";
import { drawNoise } from "./noise.js";
import { duration } from "./words.js";

const WIDTH = 168; // of an image among others, in CSS pixels
const WIDTH_ALONE = 320;
const PIXELS_UP_TO = 96; // larger images are not enlarged
const IN_PICTURES = [1, 3, 4]; // numbers of channels that a PNG has

/** One image and its caption. */
export class Picture {
  #model;
  #frame;
  #name = el("span", {});
  #time = el("span", { className: "time" });
  #seed = el("span", { className: "seed-of" });
  #bar = el("span", { className: "bar-of", "aria-hidden": "true" });

  constructor(model, label) {
    this.#model = model;
    const [height, width] = shownSidesOf(model);
    const noise = el("canvas", { width, height });
    drawNoise(noise);
    this.#name.textContent = label;
    this.#frame = el("button", { type: "button", className: "frame", disabled: true, "aria-label": label }, noise);
    const caption = el("span", { className: "caption" }, this.#name, this.#time, this.#seed);
    this.element = el("li", { className: "picture" }, this.#frame, this.#bar, caption);
    this.element.dataset.state = "waiting";
  }

  /** Show the number of steps taken; the last ones of a cascade, `later`, are those of its second stage. */
  progress(step, steps, later) {
    this.element.dataset.state = "sampling";
    this.#bar.style.setProperty("--done", step / steps);
    this.#bar.style.setProperty("--border", 1 - later / steps);
    this.#time.textContent = `${step}/${steps}`;
  }

  /** Show a preview. */
  preview(b64, format) {
    this.#show(pictureUrl(b64, format), "");
  }

  /** Show the result: an image of the service's answer. */
  done(image, onOpen) {
    const name = image.class ?? "Picture";
    this.element.dataset.state = "done";
    this.#name.textContent = name;
    this.#time.textContent = duration(image.compute_ms / 1000);
    this.#seed.textContent = `seed ${image.seed}${image.image_index ? ` · ${image.image_index}` : ""}`;
    this.#show(pictureUrl(image.b64_json), "");
    this.#frame.disabled = false;
    this.#frame.setAttribute("aria-label", `${name}, seed ${image.seed}, image ${image.image_index}: details`);
    this.#frame.addEventListener("click", onOpen);
  }

  /** Show that the image failed. */
  stop() {
    if (this.element.dataset.state !== "done") this.element.dataset.state = "stopped";
  }

  #show(src, alt) {
    const shown = this.#frame.firstChild;
    if (shown instanceof HTMLImageElement) shown.src = src;
    else shown.replaceWith(el("img", { src, alt, className: isSmall(sidesOf(this.#model)) ? "pixels" : "" }));
  }
}

/** Return height and width of a model's images. */
export function sidesOf(model) {
  return bothOf(model.image_size);
}

/** Return whether a model's images are pictures; others are sent as arrays. */
export function arePictures(model) {
  return IN_PICTURES.includes(model.image_channels);
}

/** Return height and width of what is shown of a model's images. */
export function shownSidesOf(model) {
  return arePictures(model) ? sidesOf(model) : sidesOfChannels(sidesOf(model), model.image_channels);
}

/** Return height and width of the pictures that a model begins with: of a cascade, those of its base. */
export function givenSidesOf(model) {
  return bothOf(model.cascade?.given_size ?? model.image_size);
}

function bothOf(size) {
  return Array.isArray(size) ? size : [size, size];
}

/** Return the size of images as text: "32 × 32 pixels, grey". */
export function sizeText({ height, width, channels }) {
  const colours = { 1: "grey", 3: "colour" }[channels] ?? `${channels} channels`;
  return `${width}\u00a0×\u00a0${height} pixels, ${colours}`;
}

/** Return whether images are so small that they are shown with their pixels visible. */
export function isSmall([height, width]) {
  return Math.max(height, width) <= PIXELS_UP_TO;
}

/** Show a file in base64 as the service fits it; an array of the user, of any type, is not shown. */
export function showFitted(picture, content, fit) {
  picture.hidden = isArray(content);
  if (!picture.hidden) showPicture(picture, content, fit);
}

/** Show a file in base64, a picture or an array of the service. */
export function showPicture(picture, content, fit) {
  picture.src = pictureUrl(content);
  picture.dataset.fit = fit;
  picture.onload = () => picture.classList.toggle("pixels", isSmall([picture.naturalHeight, picture.naturalWidth]));
}

/** Return the conditioning image of a request, as an element beside its results. */
export function conditionPicture(model, { cond, fit }) {
  const title = model.cond.low_resolution ? "To enlarge" : "Condition";
  const picture = el("img", { alt: "" }); // its caption names it
  showFitted(picture, cond, fit);
  const frame = el("span", { className: "frame" }, picture.hidden ? el("span", { className: "array" }, "Array") : picture);
  const caption = el("span", { className: "caption" }, el("span", {}, title));
  return el("li", { className: "picture condition" }, frame, caption);
}

/** Return the width to show images at: an integer multiple of their pixels, if possible. */
export function pictureWidth(height, width, pictures) {
  const room = pictures === 1 ? WIDTH_ALONE : WIDTH;
  const longest = Math.max(height, width);
  return longest > room ? Math.max(1, Math.round((room * width) / longest)) : Math.floor(room / longest) * width;
}
