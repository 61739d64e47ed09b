// The page: a form, the runs started with it, and the activity of the service.

import { call } from "./api.js";
import { Controls, keptSettings } from "./controls.js";
import { installDetail } from "./detail.js";
import { byId, el } from "./dom.js";
import { forgetRuns, keepRun, keptRuns } from "./kept.js";
import { watchService } from "./live.js";
import { drawNoise } from "./noise.js";
import { sidesOf, sizeText } from "./pictures.js";
import { Run } from "./run.js";
import { installTheme } from "./theme.js";
import { explain } from "./words.js";

const runs = byId("runs");
const controls = new Controls((request) => start(request));
let models = [];
let model = null;

installTheme();
installDetail();
drawNoise(byId("empty-noise"));
byId("clear").addEventListener("click", clear);
byId("model").addEventListener("change", ({ target }) => choose(target.value));
for (const kept of keptRuns().reverse()) add(kept.request, kept.model).finish(kept.answer);
await connect();
watchService();

async function connect() {
  try {
    const [served, { components }] = await Promise.all(["v1/models", "openapi.json"].map(read));
    controls.offerSamplers(served.samplers, components.schemas);
    offer(served.models);
    byId("notice").replaceChildren();
  } catch (error) {
    const { title, text } = explain(error);
    const again = el("button", { type: "button", onclick: connect }, "Try again");
    byId("notice").replaceChildren(el("div", { className: "notice" }, el("strong", {}, title), ` ${text} `, again));
  }
}

async function read(path) {
  return (await call(path)).json();
}

function offer(served) {
  models = served;
  byId("model").replaceChildren(...models.map(({ name }) => el("option", { value: name }, name)));
  byId("model-choice").hidden = models.length === 1;
  choose(keptSettings()?.model);
}

/** Choose a model by name; the first one if there is none of that name. */
function choose(name) {
  model = models.find((one) => one.name === name) ?? models[0];
  byId("model").value = model.name;
  controls.show(model, models);
  byId("about-model").textContent = `${model.name}: ${sizeText(shapeOf(model))}. ${model.backend}.`;
}

function shapeOf(ofModel) {
  const [height, width] = sidesOf(ofModel);
  return { height, width, channels: ofModel.image_channels };
}

/** Return the models that are conditioned on pictures of a model's shape. */
function takersOf(ofModel) {
  const shape = Object.entries(shapeOf(ofModel));
  return models.filter(({ cond }) => cond && shape.every(([name, size]) => cond[name] === size));
}

function start(request) {
  const run = add(request, model);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  run.element.scrollIntoView({ behavior: still ? "auto" : "smooth", block: "nearest" });
  run.start();
}

function add(request, ofModel) {
  const run = new Run(request, ofModel, {
    onDone: (answer) => keepRun({ request, model: ofModel, answer }),
    onSeed: (seed) => controls.useSeed(seed),
    onEdit: (file) => controls.useFile(file),
    onCondition: (taker, file, image) => {
      choose(taker.name);
      const isSameClass = taker.classes?.[image.class_index] === image.class;
      controls.useCondition(file, isSameClass ? image.class_index : null);
    },
    takers: () => takersOf(ofModel),
    onAgain: () => {
      const again = add(request, ofModel);
      run.element.replaceWith(again.element);
      again.start();
    },
  });
  runs.prepend(run.element);
  byId("empty").hidden = true;
  byId("clear").hidden = false;
  return run;
}

/** Remove the runs that have ended; runs in progress stay. */
function clear() {
  forgetRuns();
  for (const run of [...runs.children]) {
    if (!["waiting", "sampling"].includes(run.dataset.state)) run.remove();
  }
  byId("empty").hidden = runs.childElementCount > 0;
  byId("clear").hidden = runs.childElementCount === 0;
}
