// The form: converts its fields to the body of a request. Its values are kept across reloads, per tab.

import { Conditioning } from "./conditioning.js";
import { byId } from "./dom.js";
import { Gallery } from "./gallery.js";
import { Given } from "./given.js";
import { Samplers } from "./samplers.js";
import { arePictures } from "./pictures.js";
import { showSlider } from "./sliders.js";
import { store, stored } from "./storage.js";
import { Upsampling } from "./upsampling.js";

const SLOT = "iddpm.settings";
const STEP = 5; // of the slider of the steps
const SEEDS = 1_000_000; // short enough to remember

export class Controls {
  #form = byId("controls");
  #gallery = new Gallery(() => this.#keep());
  #samplers = new Samplers(() => this.#recommendSteps());
  #upsampling = new Upsampling();
  #conditioning = new Conditioning(() => this.#allowGenerate());
  #given = new Given(this.#conditioning, () => this.#allowGenerate());
  #sliders = ["n", "steps", "cfg-scale", "classifier-scale", "strength"].map(byId);
  #model = null;

  constructor(onGenerate) {
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.#conditioning.isComplete()) return;
      if (byId("roll").checked) this.#roll();
      this.#keep();
      onGenerate(this.request());
    });
    document.addEventListener("keydown", (event) => {
      const canGenerate = !document.querySelector("dialog[open]") && !byId("generate").disabled;
      const asks = event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat;
      if (asks && canGenerate) this.#form.requestSubmit();
    });
    this.#form.addEventListener("input", () => this.#changed());
    byId("dice").addEventListener("click", () => {
      this.#roll();
      this.#changed();
    });
    this.#roll();
  }

  /** Offer the samplers of the service; call it before `show`. See `Samplers.offer`. */
  offerSamplers(samplers, { GenerateRequest, UpsampleOptions }) {
    this.#samplers.offer(samplers, GenerateRequest.properties);
    this.#upsampling.offer(samplers, UpsampleOptions.properties);
  }

  /** Offer the options of one of the served models, and restore the values set before. */
  show(model, models) {
    this.#model = model;
    const [, steps, guidance] = this.#sliders;
    [steps.min, steps.max] = this.#samplers.stepsOfAll.map((bound) => Math.min(bound, model.num_timesteps));
    steps.step = steps.min % STEP ? 1 : STEP; // the values of a slider begin with its least
    guidance.value = model.default_cfg_scale;
    byId("guidance-field").hidden = !model.guidance;
    byId("classifier-field").hidden = !model.classifier_guidance;
    this.#gallery.show(model);
    this.#upsampling.show(model, models);
    this.#conditioning.show(model);
    this.#given.show(model);
    this.#restore();
    this.#changed();
    this.#allowGenerate();
  }

  /** Set the seed, and keep it for the next runs. */
  useSeed(seed) {
    byId("seed").value = seed;
    byId("roll").checked = false;
    this.#changed();
  }

  /** Begin the next runs with a result, and show where. */
  useFile(file) {
    byId("picture").focus();
    return this.#given.use(file);
  }

  /** Condition the next runs on a result of a class, and show where. */
  useCondition(file, classIndex) {
    this.#gallery.choose(classIndex);
    this.#changed();
    byId("cond").focus();
    return this.#conditioning.use(file);
  }

  /** Return the values of the fields as the body of POST v1/generate. */
  request() {
    const [n, steps, guidance, byClassifier] = this.#sliders.map((slider) => Number(slider.value));
    const chosen = this.#gallery.chosen;
    return {
      model: this.#model.name, // also if there is one: an administrator may load another
      ...(chosen === null ? {} : { class: className(this.#model, chosen) }),
      n,
      steps,
      ...this.#samplers.fields,
      ...(this.#model.guidance ? { cfg_scale: guidance } : {}),
      ...(this.#model.classifier_guidance ? { classifier_scale: byClassifier } : {}),
      seed: Number(byId("seed").value),
      ...(arePictures(this.#model) ? {} : { format: "npy" }),
      ...this.#upsampling.fields,
      ...this.#given.fields,
      ...this.#conditioning.fields,
    };
  }

  /** Move the steps into the range that is recommended for the chosen sampler. */
  #recommendSteps() {
    const [least, most] = this.#samplers.recommendedSteps;
    const steps = byId("steps");
    steps.value = Math.min(Math.max(steps.value, least), most);
    this.#changed();
  }

  #allowGenerate() {
    byId("generate").disabled = !this.#model || this.#given.isReading || this.#conditioning.isReading;
  }

  #roll() {
    byId("seed").value = Math.floor(Math.random() * SEEDS);
  }

  #changed() {
    for (const slider of this.#sliders) showSlider(slider);
    if (!this.#model) return;
    this.#samplers.show();
    this.#upsampling.refresh();
    this.#given.refresh();
    this.#keep();
  }

  #keep() {
    const sliders = Object.fromEntries(this.#sliders.map(({ id, value }) => [id, value]));
    const settings = {
      model: this.#model.name,
      class: this.#gallery.chosen,
      ...this.#samplers.settings,
      ...this.#upsampling.settings,
      seed: byId("seed").value,
      roll: byId("roll").checked,
      ...sliders,
    };
    store(SLOT, JSON.stringify(settings));
  }

  #restore() {
    const settings = keptSettings();
    if (settings?.model !== this.#model.name) return;
    for (const slider of this.#sliders) slider.value = settings[slider.id] ?? slider.value;
    this.#gallery.choose(settings.class);
    this.#samplers.restore(settings);
    this.#upsampling.restore(settings);
    byId("seed").value = settings.seed;
    byId("roll").checked = settings.roll;
  }
}

/** Return the values set in this tab before, or null. */
export function keptSettings() {
  return JSON.parse(stored(SLOT));
}

/** Return how a request names a class: by name, or by index if several classes have this name. */
export function className(model, index) {
  const name = model.classes[index];
  const alike = model.classes.filter((other) => other.toLowerCase() === name.toLowerCase());
  return alike.length === 1 ? name : index;
}
