// The conditioning image of the models that need one, and the fields of a request with it. The service fits it.

import { byId } from "./dom.js";
import { clearFieldErrors, showFieldErrors } from "./field_errors.js";
import { base64Of, isArray } from "./files.js";
import { showFitted, sizeText } from "./pictures.js";
import { takeFiles } from "./sources.js";

const MISSING = "Choose one first: this model cannot run without it.";
const UNREADABLE = "Must be a PNG, WebP or JPEG picture, or an npy or npz file.";

export class Conditioning {
  #cond = null; // of GET v1/models; null: the model takes none
  #content = null; // the file in base64
  #isReading = false;
  #newest = 0; // counts the choices: a large file may be read after a smaller one that was chosen later
  #onChange;

  /**
   * @param {() => void} onChange - called when `isReading`, or the fields, have changed
   */
  constructor(onChange) {
    this.#onChange = onChange;
    takeFiles(byId("cond"), (file) => this.use(file), () => this.#content === null);
    byId("cond-fit").addEventListener("change", () => this.#show());
    byId("cond-remove").addEventListener("click", () => {
      this.#forget();
      byId("cond").focus();
    });
  }

  /** Ask for the image that a model needs, if it needs one; one that is chosen stays. */
  show(model) {
    this.#cond = model.cond;
    byId("conditioning").hidden = !this.#cond;
    if (!this.#cond) return;
    const isSmall = this.#cond.low_resolution;
    byId("cond-title").textContent = isSmall ? "Picture to enlarge" : "Conditioning image";
    byId("cond-label").textContent = isSmall ? "Choose a small picture" : "Choose a conditioning image";
    byId("cond-hint").textContent = `or drop or paste one. The model takes ${sizeText(this.#cond)}.`;
    byId("cond-picture").alt = isSmall ? "Picture to enlarge" : "Conditioning image";
    byId("cond-picture").style.setProperty("--aspect", `${this.#cond.width} / ${this.#cond.height}`);
    this.#show();
  }

  /** Condition the next runs on a file, as on one that the user chooses. */
  async use(file) {
    const turn = ++this.#newest;
    this.#isReading = true;
    this.#onChange();
    const content = await base64Of(file).catch(() => ""); // a folder, or a file that is gone
    const isReadable = isArray(content) || (await createImageBitmap(file).then((image) => !image.close(), () => false));
    if (turn !== this.#newest) return;
    this.#isReading = false;
    clearFieldErrors();
    if (!isReadable) {
      this.#forget();
      showFieldErrors([{ field: "cond", message: UNREADABLE }]);
      return;
    }
    this.#content = content;
    byId("cond-name").textContent = file.name ?? "";
    this.#show();
  }

  /** Whether the model takes such an image, and the chosen one is not ready yet. */
  get isReading() {
    return Boolean(this.#cond) && this.#isReading;
  }

  /** The fields of a request: none if the model takes no such image. */
  get fields() {
    return this.#cond && this.#content ? { cond: this.#content, fit: byId("cond-fit").value } : {};
  }

  /** Return whether nothing is missing; if the image is, ask for it. */
  isComplete() {
    if (!this.#cond || this.#content) return true;
    clearFieldErrors();
    showFieldErrors([{ field: "cond", message: MISSING }]);
    byId("cond").focus();
    return false;
  }

  #forget() {
    this.#newest++;
    this.#isReading = false;
    this.#content = null;
    this.#show();
  }

  #show() {
    byId("cond-chosen").hidden = !this.#content;
    if (this.#content) showFitted(byId("cond-picture"), this.#content, byId("cond-fit").value);
    this.#onChange();
  }
}
