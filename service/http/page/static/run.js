// A run: one request, from the press of the button to its images.

import { Refusal, generate } from "./api.js";
import { openDetail } from "./detail.js";
import { announce, el } from "./dom.js";
import { readEvents } from "./events.js";
import { clearFieldErrors, showFieldErrors } from "./field_errors.js";
import { bytesOf, copy, fileName, save } from "./files.js";
import { Picture, arePictures, conditionPicture, pictureWidth, shownSidesOf } from "./pictures.js";
import { curl, python, serviceUrl } from "./snippets.js";
import { count, duration, explain, samplerTitle } from "./words.js";
import { zip } from "./zip.js";

const PREVIEWS = 25; // per picture: enough to look like a film

export class Run {
  #model;
  #pictures;
  #abort = new AbortController();
  #status = el("p", { className: "status" });
  #bar = el("progress", { max: 1, value: 0 });
  #actions = el("div", { className: "actions" });
  #steps = new Map(); // by image
  #callbacks;

  /**
   * @param {object} request - body of POST v1/generate
   * @param {object} model - a model of GET v1/models
   * @param {{onDone: (answer: object) => void, onAgain: () => void}} callbacks - and those of `openDetail`
   */
  constructor(request, model, callbacks) {
    this.request = request;
    this.#model = model;
    this.#callbacks = callbacks;
    this.#pictures = Array.from({ length: request.n }, () => new Picture(model, this.#label));
    const items = this.#pictures.map(({ element }) => element);
    if (request.cond) items.unshift(conditionPicture(model, request));
    const grid = el("ul", { className: "pictures" }, ...items);
    grid.style.setProperty("--aspect", shownSidesOf(model).toReversed().join(" / "));
    grid.style.setProperty("--picture", `${pictureWidth(...shownSidesOf(model), items.length)}px`);
    this.#bar.setAttribute("aria-label", `Progress of ${this.#title}`);
    const head = el("div", { className: "run-head" }, el("h3", {}, this.#label), this.#actions);
    const facts = el("div", { className: "run-head" }, el("p", { className: "recipe" }, this.#recipe), this.#status);
    this.element = el("article", { className: "run", "aria-label": this.#title }, head, facts, this.#bar, grid);
    this.element.dataset.state = "waiting";
  }

  /** Request the images and show their progress; returns when the run has ended for any reason. */
  async start() {
    this.#status.textContent = "Asking …";
    this.#actions.replaceChildren(el("button", { type: "button", onclick: () => this.cancel() }, "Cancel"));
    announce(`Generating ${this.#title}`);
    clearFieldErrors();
    try {
      const steps = this.request.steps + (this.request.upsample?.steps ?? 0);
      const every = Math.max(1, Math.round(steps / PREVIEWS));
      const answer = await generate({ ...this.request, stream: true, preview_every: every }, this.#abort.signal);
      for await (const { name, data } of readEvents(answer)) {
        if (name === "queued") this.#onQueued(data);
        else if (name === "progress") this.#onProgress(data);
        else if (name === "preview") this.#pictures[data.position].preview(data.b64_json, data.format);
        else if (name === "failed") throw new Refusal(data.status, data.detail, null);
        else if (name === "completed") {
          this.finish(data);
          this.#callbacks.onDone(data);
          announce(`${this.#title}: done`);
          return;
        }
      }
      throw new DOMException("The answer broke off", "NetworkError");
    } catch (error) {
      if (error.name === "AbortError") this.#end("cancelled", "Cancelled", "Its work has stopped.");
      else {
        const { title, text } = explain(error);
        this.#end("failed", title, text);
        showFieldErrors(error.errors ?? []);
      }
    }
  }

  /** Cancel the run: the service detects that the client has disconnected, and frees the rows at its next step. */
  cancel() {
    this.#abort.abort();
  }

  /** Show the images of an answer. */
  finish(answer) {
    this.element.dataset.state = "done";
    this.#status.textContent = `${duration(answer.timing.finish_s)} in all`;
    answer.images.forEach((image, k) => {
      this.#pictures[k].done(image, () => openDetail(image, this.#oneOf(image), answer, this.#callbacks));
    });
    const snippet = (accept, file) => ({ url: serviceUrl(), accept, file, body: this.request });
    const name = `iddpm-${this.request.seed}`;
    const wanted = arePictures(this.#model)
      ? snippet("application/zip", `${name}.zip`)
      : snippet("application/x-npz", `${name}.npz`);
    const files = () =>
      answer.images.map((image, k) => ({
        name: `${String(k).padStart(4, "0")}-${fileName(image)}`,
        bytes: bytesOf(image.b64_json),
      }));
    this.#actions.replaceChildren(
      button("Copy curl", (event) => copy(event.currentTarget, curl(wanted))),
      button("Copy Python", (event) => copy(event.currentTarget, python(wanted))),
      button("Download zip", () => save(zip(files()), `${name}.zip`)),
    );
  }

  get #label() {
    return this.request.class === undefined ? (this.#model.classes ? "Any class" : "Pictures") : this.#className;
  }

  get #className() {
    return typeof this.request.class === "number" ? this.#model.classes[this.request.class] : this.request.class;
  }

  get #title() {
    return `${this.#label}, ${count(this.request.n, "image")}, seed ${this.request.seed}`;
  }

  get #recipe() {
    const { n, steps, sampler, eta, cfg_scale: guidance, classifier_scale: byClassifier, seed } = this.request;
    const { image, mask, strength, resample, cond, upsample } = this.request;
    const guided = guidance === undefined || guidance === 1 ? [] : [`guidance ${guidance}`];
    if (byClassifier) guided.push(`classifier ${byClassifier}`);
    const bySampler = [samplerTitle(sampler), ...(eta ? [`eta ${eta}`] : [])];
    const given = image === undefined ? [] : [`strength ${strength}`, ...(mask ? ["mask"] : [])];
    if (resample) given.push(`resampled ${resample.times}×${resample.jump}`);
    if (cond) given.push(this.#model.cond.low_resolution ? "enlarged" : "conditioned");
    if (upsample) given.push(...upsampled(upsample));
    return [count(n, "image"), `${steps} steps`, ...bySampler, ...guided, ...given, `seed ${seed}`].join(" · ");
  }

  /** Return the request that generates one image of this run alone. */
  #oneOf(image) {
    const { n, ...request } = this.request;
    const named = image.class_index === null ? {} : { class: request.class ?? image.class_index };
    return { ...request, ...named, ...(image.image_index ? { image_index: image.image_index } : {}) };
  }

  #onQueued({ images_ahead: ahead, predicted_wait_s: wait, eta_s: eta }) {
    const behind = ahead ? `Waiting for ${count(ahead, "image")}, starts in about ${duration(wait)}` : "Starting";
    this.#status.textContent = eta ? `${behind} · done in about ${duration(eta)}` : behind;
  }

  #onProgress({ position, step, steps, eta_s: eta }) {
    this.element.dataset.state = "sampling";
    this.#pictures[position].progress(step, steps, this.request.upsample?.steps ?? 0);
    this.#steps.set(position, step);
    const taken = [...this.#steps.values()].reduce((sum, value) => sum + value, 0);
    this.#bar.value = taken / (steps * this.request.n);
    this.#status.textContent = eta ? `About ${duration(eta)} left` : "Sampling";
  }

  #end(state, title, text) {
    this.element.dataset.state = state;
    for (const picture of this.#pictures) picture.stop();
    this.#status.replaceChildren(el("strong", {}, title), ` ${text}`);
    this.#actions.replaceChildren(button("Try again", () => this.#callbacks.onAgain()));
    announce(`${title}. ${text}`);
  }
}

/** Describe the second stage of a cascade. */
function upsampled({ steps, sampler, cfg_scale: guidance = 1, classifier_scale: byClassifier }) {
  return [
    `then ${steps} steps`,
    samplerTitle(sampler),
    ...(guidance === 1 ? [] : [`guidance ${guidance}`]),
    ...(byClassifier ? [`classifier ${byClassifier}`] : []),
  ];
}

function button(label, onclick) {
  return el("button", { type: "button", onclick }, label);
}
