// The form: from its fields to the body of a request. What is set outlives a reload, in this tab.

import { byId, el } from "./dom.js";
import { Gallery } from "./gallery.js";
import { samplerTitle } from "./words.js";

const SLOT = "iddpm.settings";
const SEEDS = 1_000_000; // short enough to be remembered
const OFF = { "cfg-scale": "1", "classifier-scale": "0" };
const MOST_STEPS = 250; // what the paper samples with; more is for curl

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

  /** Offer the samplers that the service has; call it before `show`. */
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

  /** Offer what a model can do, and take up what was set before. */
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

  /** Take a seed to generate with, and stay with it. */
  useSeed(seed) {
    byId("seed").value = seed;
    byId("roll").checked = false;
    this.#changed();
  }

  /** What the fields say, as the body of POST v1/generate. */
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

/** What was set in this tab before; null where nothing was. */
export function keptSettings() {
  return JSON.parse(sessionStorage.getItem(SLOT));
}

/** How to ask for a class: by name, or by index where several are called alike. */
export function className(model, index) {
  const name = model.classes[index];
  const alike = model.classes.filter((other) => other.toLowerCase() === name.toLowerCase());
  return alike.length === 1 ? name : index;
}
