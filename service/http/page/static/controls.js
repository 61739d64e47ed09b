// The form: converts its fields to the body of a request. Its values are kept across reloads, per tab.

import { byId, el } from "./dom.js";
import { Gallery } from "./gallery.js";
import { samplerTitle } from "./words.js";

const SLOT = "iddpm.settings";
const SEEDS = 1_000_000; // short enough to remember
const OFF = { "cfg-scale": "1", "classifier-scale": "0" };
const MOST_STEPS = 250; // the number of steps in the paper; use curl for more

export class Controls {
  #form = byId("controls");
  #gallery = new Gallery(() => this.#keep());
  #sliders = ["n", "steps", "cfg-scale", "classifier-scale"].map(byId);
  #model = null;
  #isOnlyModel = true;

  constructor(onGenerate) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (byId("roll").checked) this.#roll();
      this.#keep();
      onGenerate(this.request());
    });
    document.addEventListener("keydown", (event) => {
      const canGenerate = !document.querySelector("dialog[open]") && !byId("generate").disabled;
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && canGenerate) this.#form.requestSubmit();
    });
    this.#form.addEventListener("input", () => this.#changed());
    byId("dice").addEventListener("click", () => {
      this.#roll();
      this.#changed();
    });
    this.#roll();
  }

  /** Offer the samplers of the service; call it before `show`. */
  offerSamplers({ names, preset }) {
    const choices = names.map((value) =>
      el(
        "label",
        {},
        el("input", { type: "radio", name: "sampler", value, checked: value === preset }),
        el("span", {}, samplerTitle(value)),
      ),
    );
    byId("samplers").replaceChildren(...choices);
  }

  /** Offer the options of a model, and restore the values set before. */
  show(model, isOnlyModel) {
    this.#model = model;
    this.#isOnlyModel = isOnlyModel;
    const [, steps, guidance] = this.#sliders;
    steps.max = Math.min(MOST_STEPS, model.num_timesteps);
    steps.min = Math.min(10, model.num_timesteps);
    guidance.value = model.default_cfg_scale;
    byId("guidance-field").hidden = !model.guidance;
    byId("classifier-field").hidden = !model.classifier_guidance;
    this.#gallery.show(model);
    this.#restore();
    this.#changed();
    byId("generate").disabled = false;
  }

  /** Set the seed, and keep it for the next runs. */
  useSeed(seed) {
    byId("seed").value = seed;
    byId("roll").checked = false;
    this.#changed();
  }

  /** Return the values of the fields as the body of POST v1/generate. */
  request() {
    const [n, steps, guidance, byClassifier] = this.#sliders.map((slider) => Number(slider.value));
    const chosen = this.#gallery.chosen;
    return {
      ...(this.#isOnlyModel ? {} : { model: this.#model.name }),
      ...(chosen === null ? {} : { class: className(this.#model, chosen) }),
      n,
      steps,
      sampler: this.#sampler,
      ...(this.#model.guidance ? { cfg_scale: guidance } : {}),
      ...(this.#model.classifier_guidance ? { classifier_scale: byClassifier } : {}),
      seed: Number(byId("seed").value),
    };
  }

  get #sampler() {
    return this.#form.elements.sampler.value;
  }

  #roll() {
    byId("seed").value = Math.floor(Math.random() * SEEDS);
  }

  #changed() {
    for (const slider of this.#sliders) {
      const part = (slider.value - slider.min) / (slider.max - slider.min || 1);
      slider.style.setProperty("--filled", `${100 * part}%`);
      const off = slider.value === OFF[slider.id];
      byId(`${slider.id}-value`).textContent = off ? "off" : slider.value;
    }
    if (this.#model) this.#keep();
  }

  #keep() {
    const sliders = Object.fromEntries(this.#sliders.map(({ id, value }) => [id, value]));
    const settings = {
      model: this.#model.name,
      class: this.#gallery.chosen,
      sampler: this.#sampler,
      seed: byId("seed").value,
      roll: byId("roll").checked,
      ...sliders,
    };
    sessionStorage.setItem(SLOT, JSON.stringify(settings));
  }

  #restore() {
    const settings = keptSettings();
    if (settings?.model !== this.#model.name) return;
    for (const slider of this.#sliders) slider.value = settings[slider.id];
    this.#gallery.choose(settings.class);
    this.#form.elements.sampler.value = settings.sampler;
    byId("seed").value = settings.seed;
    byId("roll").checked = settings.roll;
  }
}

/** Return the values set in this tab before, or null. */
export function keptSettings() {
  return JSON.parse(sessionStorage.getItem(SLOT));
}

/** Return how a request names a class: by name, or by index if several classes have this name. */
export function className(model, index) {
  const name = model.classes[index];
  const alike = model.classes.filter((other) => other.toLowerCase() === name.toLowerCase());
  return alike.length === 1 ? name : index;
}
