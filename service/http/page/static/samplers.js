// The choice of a sampler, the options that only some samplers have, and the steps that are recommended for it.

import { byId, el } from "./dom.js";
import { showSlider } from "./sliders.js";
import { samplerTitle } from "./words.js";

export class Samplers {
  #box = byId("samplers");
  #optionBox = byId("sampler-options");
  #samplers = [];
  #sliders = [];

  /**
   * @param {() => void} onChoose - called when the user chooses another sampler
   */
  constructor(onChoose) {
    this.#box.addEventListener("change", onChoose);
  }

  /**
   * Offer samplers; call it before all else.
   * @param {{name: string, options: string[], recommended_steps: [number, number]}[]} samplers - of GET v1/models
   * @param {object} fields - the properties of GenerateRequest in the OpenAPI document: the default, and limits
   */
  offer(samplers, fields) {
    this.#samplers = samplers;
    const choices = samplers.map(({ name: value }) =>
      el(
        "label",
        {},
        el("input", { type: "radio", name: "sampler", value, checked: value === fields.sampler.default }),
        el("span", {}, samplerTitle(value)),
      ),
    );
    this.#box.replaceChildren(...choices);
    const names = [...new Set(samplers.flatMap(({ options }) => options))];
    this.#optionBox.replaceChildren(...names.map((name) => optionField(name, fields[name])));
    this.#sliders = names.map(byId);
  }

  /** The name of the chosen sampler. */
  get chosen() {
    return this.#box.querySelector("input:checked").value;
  }

  /** The fields that a request with the chosen sampler has for it, as the user has set them. */
  get fields() {
    const { options } = this.#info;
    const values = this.#sliders.filter(({ id }) => options.includes(id)).map(({ id, value }) => [id, Number(value)]);
    return { sampler: this.chosen, ...Object.fromEntries(values) };
  }

  /** The least and the most steps that are recommended for the chosen sampler. */
  get recommendedSteps() {
    return this.#info.recommended_steps;
  }

  /** The least and the most steps that are recommended for any sampler. */
  get stepsOfAll() {
    const ranges = this.#samplers.map(({ recommended_steps: steps }) => steps);
    return [Math.min(...ranges.map(([least]) => least)), Math.max(...ranges.map(([, most]) => most))];
  }

  /** The values that are kept across reloads. */
  get settings() {
    return { sampler: this.chosen, ...Object.fromEntries(this.#sliders.map(({ id, value }) => [id, value])) };
  }

  /** Set what `settings` returned before; what the service no longer has stays as it is. */
  restore(settings) {
    for (const choice of this.#box.querySelectorAll("input")) choice.checked ||= choice.value === settings.sampler;
    for (const slider of this.#sliders) slider.value = settings[slider.id] ?? slider.value;
  }

  /** Show the options of the chosen sampler, and its recommended steps. */
  show() {
    const { options, recommended_steps: steps } = this.#info;
    for (const slider of this.#sliders) {
      slider.closest(".field").hidden = !options.includes(slider.id);
      showSlider(slider);
    }
    byId("steps-hint").textContent = `Recommended for ${samplerTitle(this.chosen)}: ${steps.join(" to ")}.`;
  }

  get #info() {
    return this.#samplers.find(({ name }) => name === this.chosen);
  }
}

function optionField(name, { title, default: preset, anyOf }) {
  // The limits of a field for two types of numbers have pydantic's names
  const { ge: min, le: max } = anyOf.find(({ ge }) => ge !== undefined);
  const slider = el("input", { type: "range", id: name, min, max, step: (max - min) / 20, value: preset ?? min });
  const label = el("label", { htmlFor: name }, title);
  return el("div", { className: "field", "data-fields": name }, label, el("output", { id: `${name}-value` }), slider);
}
