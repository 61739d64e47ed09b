// The classes of a model: thumbnails to choose from, and a search field if there are many.

import { call } from "./api.js";
import { byId, el } from "./dom.js";
import { arePictures, isSmall, sidesOf } from "./pictures.js";
import { count } from "./words.js";

const SEARCH_FROM = 24;
const AT_ONCE = 2; // of the few connections that all tabs share
const RETRY_MS = 5000;

export class Gallery {
  #box = byId("classes");
  #search = byId("class-search");
  #model = null;
  #wanted = new Set(); // visible labels whose thumbnail has not arrived
  #loading = 0;
  #seen = new IntersectionObserver((entries) => this.#onSeen(entries), { root: this.#box, rootMargin: "80px" });

  constructor(onChange) {
    this.#box.addEventListener("change", () => {
      this.#showChosen();
      onChange();
    });
    this.#search.addEventListener("input", () => this.#filter());
    this.#search.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.ctrlKey || event.metaKey || event.isComposing) return;
      event.preventDefault(); // Enter chooses the first class found instead of generating
      if (this.#search.value.trim()) this.#labels().find((label) => !label.hidden)?.control.click();
    });
  }

  /** Show the classes of another model; with the first entry, the seed determines the class. */
  show(model) {
    this.#model = model;
    this.#seen.disconnect();
    this.#wanted.clear();
    const names = model.classes ?? [];
    byId("gallery").hidden = !names.length;
    this.#search.hidden = names.length < SEARCH_FROM;
    this.#search.placeholder = `Search ${count(names.length, "class", "classes")}`;
    this.#search.value = "";
    this.#box.replaceChildren(entry("", "Any", "?"), ...names.map((name, index) => entry(index, name, "")));
    this.#filter();
    this.choose(null);
    const hasThumbnails = !model.cond && arePictures(model); // no picture of a class without a conditioning image
    this.#box.classList.toggle("bare", !hasThumbnails);
    if (hasThumbnails) for (const label of this.#labels().slice(1)) this.#seen.observe(label);
  }

  /** The index of the chosen class; null for any class. */
  get chosen() {
    const value = this.#box.querySelector("input:checked")?.value ?? "";
    return value === "" ? null : Number(value);
  }

  /** Choose a class by index; any class for null or an index that the model does not have. */
  choose(index) {
    const inputs = [...this.#box.querySelectorAll("input")];
    const found = inputs.find((input) => input.value === String(index ?? "")) ?? inputs[0];
    found.checked = true;
    this.#showChosen();
  }

  #labels() {
    return [...this.#box.children];
  }

  #showChosen() {
    byId("class-chosen").textContent = this.chosen === null ? "Any" : this.#model.classes[this.chosen];
  }

  #filter() {
    const words = this.#search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const [k, label] of this.#labels().entries()) {
      const isAny = k === 0; // no class: not what is searched for
      label.hidden = words.length > 0 && (isAny || !words.every((word) => label.title.toLowerCase().includes(word)));
      found += !label.hidden;
    }
    byId("class-none").hidden = found > 0;
    byId("class-none").textContent = found ? "" : `No class is called “${this.#search.value}”.`;
  }

  #onSeen(entries) {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting) this.#wanted.add(target);
      else this.#wanted.delete(target);
    }
    this.#load();
  }

  #load() {
    for (const label of this.#wanted) {
      if (this.#loading >= AT_ONCE) return;
      this.#wanted.delete(label);
      this.#seen.unobserve(label);
      this.#loading++;
      this.#fetch(label).finally(() => {
        this.#loading--;
        this.#load();
      });
    }
  }

  async #fetch(label) {
    const model = this.#model;
    try {
      const path = `v1/models/${encodeURIComponent(model.name)}/thumbnails/${label.control.value}`;
      const answer = await call(path, { background: true, headers: { "X-Requested-With": "iddpm" } });
      const url = URL.createObjectURL(await answer.blob());
      const picture = el("img", { src: url, alt: "", className: isSmall(sidesOf(model)) ? "pixels" : "" });
      picture.addEventListener("load", () => URL.revokeObjectURL(url));
      label.querySelector(".thumb").replaceChildren(picture);
    } catch (error) {
      const temporary = ![400, 403, 404, 422, 500].includes(error.status); // busy, or unreachable for a while
      if (temporary) setTimeout(() => label.isConnected && this.#seen.observe(label), RETRY_MS);
    }
  }
}

function entry(value, name, mark) {
  const input = el("input", { type: "radio", name: "class", value: String(value) });
  const thumb = el("span", { className: "thumb", "aria-hidden": "true" }, mark);
  return el("label", { title: name }, input, thumb, el("span", { className: "name" }, name));
}
