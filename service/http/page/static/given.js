// The picture to begin with: where it comes from, how it fits the model, and the fields of a request with it.
//
// The service fits the picture: a request of strength 0 returns it as the model sees it. So the page shows exactly
// the pixels that are kept, and a file that cannot be used is refused when it is chosen.

import { generate } from "./api.js";
import { byId } from "./dom.js";
import { clearFieldErrors, showFieldErrors } from "./field_errors.js";
import { base64Of, onePictureUrl } from "./files.js";
import { MaskEditor } from "./mask_editor.js";
import { arePictures, givenSidesOf, isSmall } from "./pictures.js";
import { takeFiles } from "./sources.js";
import { explain } from "./words.js";

const TRANSPARENT = 4; // number of channels; a canvas does not show exactly what has transparency
const PICTURES = "or drop or paste one: PNG, WebP, JPEG, npy, npz";

export class Given {
  #model = null;
  #file = null;
  #picture = null; // PNG or npy in base64, in the size and the channels of the model
  #reading = null; // aborts the request that fits the picture
  #editor;
  #conditioning;
  #onChange;

  /**
   * @param {Conditioning} conditioning - of the same requests
   * @param {() => void} onChange - called when `isReading`, or the fields, have changed
   */
  constructor(conditioning, onChange) {
    this.#conditioning = conditioning;
    this.#onChange = onChange;
    this.#editor = new MaskEditor(() => this.#changed());
    takeFiles(byId("picture"), (file) => this.use(file), () => true);
    byId("fit").addEventListener("change", () => this.#fit());
    byId("given-remove").addEventListener("click", () => {
      this.#forget();
      byId("picture").focus();
    });
  }

  /** Begin with a file, as with one that the user chooses. */
  use(file) {
    this.#file = file;
    return this.#fit();
  }

  /** Offer the choice, and fit the chosen picture to the model's images. */
  show(model) {
    this.#model = model;
    byId("given").hidden = model.image_channels === TRANSPARENT;
    byId("drop-hint").textContent = arePictures(model) ? PICTURES : `or drop one: npy or npz, ${model.image_channels} channels`;
    byId("given-channels").hidden = arePictures(model);
    byId("given-picture").className = isSmall(givenSidesOf(model)) ? "pixels" : "";
    this.#editor.reset(model);
    if (this.#file && !byId("given").hidden) this.#fit();
  }

  /** Whether the chosen picture is not ready yet. */
  get isReading() {
    return this.#reading !== null;
  }

  /** The fields of a request that begins with the picture; none without one. */
  get fields() {
    if (!this.#picture || byId("given").hidden) return {};
    const resample = { times: Number(byId("resample-times").value), jump: Number(byId("resample-jump").value) };
    return {
      image: this.#picture,
      strength: Number(byId("strength").value),
      ...(this.#editor.isPainted ? { mask: this.#editor.png() } : {}),
      ...(this.#editor.isPainted && byId("resample").checked ? { resample } : {}),
    };
  }

  /** Show which of the fields apply. */
  refresh() {
    byId("resample").disabled = !this.#editor.isPainted;
    byId("resample-fields").hidden = byId("resample").disabled || !byId("resample").checked;
    for (const field of byId("resample-fields").querySelectorAll("input")) field.disabled = byId("resample-fields").hidden;
    this.#editor.showBrush();
  }

  async #fit() {
    this.#reading?.abort();
    const reading = (this.#reading = new AbortController());
    clearFieldErrors();
    byId("given-state").textContent = "Reading the picture …";
    this.#onChange();
    try {
      const image = await base64Of(this.#file);
      const model = this.#model.cascade?.base ?? this.#model.name; // which keeps the picture's size
      const body = { model, image, fit: byId("fit").value, strength: 0, steps: 2, cfg_scale: 1, seed: 0 };
      if (!arePictures(this.#model)) body.format = "npy";
      // Of strength 0, no step is taken: any conditioning image does
      if (this.#model.cond) body.cond = this.#conditioning.fields.cond ?? image;
      const answer = await (await generate(body, reading.signal)).json();
      if (reading === this.#reading) this.#begin(answer.images[0].b64_json);
    } catch (error) {
      if (reading !== this.#reading) return;
      const { title, text } = explain(error);
      this.#forget();
      if (!showFieldErrors(error.errors ?? [])) byId("given-state").textContent = `${title}. ${text}`;
    } finally {
      if (reading === this.#reading) this.#reading = null;
      this.#onChange();
    }
  }

  #begin(picture) {
    this.#picture = picture;
    this.#editor.reset(this.#model);
    byId("given-picture").src = onePictureUrl(picture);
    byId("given-state").textContent = "";
    byId("given-edit").hidden = false;
    this.#changed();
  }

  #forget() {
    this.#reading?.abort();
    this.#reading = this.#file = this.#picture = null;
    byId("given-state").textContent = "";
    byId("given-edit").hidden = true;
    clearFieldErrors();
    this.#changed();
  }

  #changed() {
    this.refresh();
    this.#onChange();
  }
}
