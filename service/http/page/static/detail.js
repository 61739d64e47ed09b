// One image, enlarged, with its parameters and the code that generates it again.

import { compare, installCompare } from "./compare.js";
import { byId, el } from "./dom.js";
import { bytesOf, copy, fileName, isArray, pictureUrl, save } from "./files.js";
import { pictureWidth } from "./pictures.js";
import { curl, python, serviceUrl } from "./snippets.js";
import { duration, samplerTitle } from "./words.js";

const LANGUAGES = { curl, python };
let wanted = null;

/**
 * @param {object} image - an image of the service's answer
 * @param {object} body - the request that generates this image alone
 * @param {object} answer - the answer that contains the image
 * @param {{onSeed: (seed: number) => void, onEdit: (file: Blob) => void,
 *   onCondition: (model: object, file: Blob, image: object) => void, takers: () => object[]}} callbacks - called when the
 *   user selects its seed, or to begin with it, or to condition a model on it: one of the `takers`
 */
export function openDetail(image, body, answer, { onSeed, onEdit, onCondition, takers }) {
  const dialog = byId("detail");
  const [type, kind] = isArray(image.b64_json) ? ["application/x-npy", "npy"] : ["image/png", "PNG"];
  wanted = { url: serviceUrl(), accept: type, file: fileName(image), body };
  byId("detail-title").textContent = image.class ?? "Picture";
  const picture = byId("detail-picture");
  picture.src = pictureUrl(image.b64_json);
  picture.onload = () => {
    picture.width = pictureWidth(picture.naturalHeight, picture.naturalWidth, 1);
    byId("detail-views").classList.toggle("pixels", picture.width >= picture.naturalWidth);
  };
  const facts = {
    Seed: image.seed,
    "Image of the seed": image.image_index,
    Steps: image.steps,
    Sampler: samplerTitle(body.sampler),
    ...(body.eta === undefined ? {} : { Eta: body.eta }),
    ...(body.cfg_scale === undefined ? {} : { Guidance: body.cfg_scale === 1 ? "off" : body.cfg_scale }),
    ...(body.classifier_scale === undefined ? {} : { Classifier: body.classifier_scale || "off" }),
    ...(body.strength === undefined ? {} : { Strength: body.strength, Mask: body.mask ? "painted" : "none" }),
    ...(image.upsampled ? { Upsampled: `${image.upsampled.steps} steps, ${samplerTitle(body.upsample.sampler)}` } : {}),
    ...(body.resample ? { Resampled: `${body.resample.times} × ${body.resample.jump} steps` } : {}),
    Waited: duration(image.queue_ms / 1000),
    Sampled: duration(image.compute_ms / 1000),
    Numerics: answer.numerics_id,
  };
  byId("detail-facts").replaceChildren(
    ...Object.entries(facts).map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
  );
  const file = new Blob([bytesOf(image.b64_json)], { type });
  byId("detail-actions").replaceChildren(
    el("button", { type: "button", onclick: () => save(file, fileName(image)) }, `Download ${kind}`),
    el("button", { type: "button", onclick: () => (onSeed(image.seed), dialog.close()) }, "Use this seed"),
    ...(byId("given").hidden // the chosen model takes no pictures
      ? []
      : [el("button", { type: "button", onclick: () => (dialog.close(), onEdit(file)) }, "Edit this picture")]),
    ...takers().map((model) => {
      const label = model.cond.low_resolution ? `Enlarge with ${model.name}` : `Condition ${model.name} on it`;
      return el("button", { type: "button", onclick: () => (dialog.close(), onCondition(model, file, image)) }, label);
    }),
  );
  showCode();
  compare(body, image.b64_json);
  dialog.showModal();
}

/** Set up the dialog; call it once. */
export function installDetail() {
  const dialog = byId("detail");
  installCompare();
  byId("detail-close").addEventListener("click", () => dialog.close());
  byId("detail-copy").addEventListener("click", (event) => copy(event.currentTarget, byId("detail-code").textContent));
  dialog.addEventListener("change", showCode);
  let pressed = null; // a selection that is dragged out of the contents is no click outside of them
  dialog.addEventListener("pointerdown", (event) => (pressed = event.target));
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog && pressed === dialog) dialog.close(); // outside its contents
  });
}

function showCode() {
  const language = document.querySelector("input[name=language]:checked").value;
  byId("detail-code").textContent = LANGUAGES[language](wanted);
}
