// How the second stage of a cascade samples: its steps, sampler and guidance.

import { byId, el } from "./dom.js";
import { showSlider } from "./sliders.js";
import { samplerTitle } from "./words.js";

export class Upsampling {
  #upsampler = null; // null: the chosen model is no cascade
  #sampler = byId("upsample-sampler");
  #steps = byId("upsample-steps");
  #guidance = byId("upsample-cfg-scale");
  #classifier = byId("upsample-classifier-scale");

  /** Offer the samplers of GET v1/models; call it before `show`. */
  offer(samplers, fields) {
    const choices = samplers.map(({ name }) => el("option", { value: name }, samplerTitle(name)));
    this.#sampler.replaceChildren(...choices);
    this.#sampler.value = fields.sampler.default;
  }

  /** Offer the options of a model's second stage, if it has one; `models` has its upsampler too. */
  show(model, models) {
    this.#upsampler = models.find(({ name }) => name === model.cascade?.upsampler) ?? null;
    byId("upsampling").hidden = !this.#upsampler;
    if (!this.#upsampler) return;
    const { num_timesteps: most, default_cfg_scale: scale, guidance, classifier_guidance: byClassifier } = this.#upsampler;
    for (const bound of ["min", "max"]) this.#steps[bound] = Math.min(this.#steps.dataset[bound], most);
    this.#guidance.value = scale;
    this.#guidance.closest(".field").hidden = !guidance;
    this.#classifier.closest(".field").hidden = !byClassifier;
    byId("upsampling-hint").textContent =
      `The model ${model.cascade.base} makes a small picture by the settings above, and ${this.#upsampler.name} enlarges it.`;
  }

  /** The field of a request: none if the model is no cascade. */
  get fields() {
    if (!this.#upsampler) return {};
    const { guidance, classifier_guidance: byClassifier } = this.#upsampler;
    const upsample = {
      steps: Number(this.#steps.value),
      sampler: this.#sampler.value,
      ...(guidance ? { cfg_scale: Number(this.#guidance.value) } : {}),
      ...(byClassifier ? { classifier_scale: Number(this.#classifier.value) } : {}),
    };
    return { upsample };
  }

  /** The values that are kept across reloads. */
  get settings() {
    return Object.fromEntries(this.#all.map(({ id, value }) => [id, value]));
  }

  /** Set what `settings` returned before; a sampler that the service no longer has stays as it is. */
  restore(settings) {
    const sampler = this.#sampler.value;
    for (const control of this.#all) control.value = settings[control.id] ?? control.value;
    this.#sampler.value ||= sampler;
  }

  /** Show the values of the sliders. */
  refresh() {
    for (const slider of [this.#steps, this.#guidance, this.#classifier]) showSlider(slider);
  }

  get #all() {
    return [this.#sampler, this.#steps, this.#guidance, this.#classifier];
  }
}
