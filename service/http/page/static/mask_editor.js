// Painting a mask on a picture: with a mouse, pen or finger, or with the keys that move a rectangle over it.

import { announce, byId, el } from "./dom.js";
import { Mask } from "./mask.js";
import { givenSidesOf } from "./pictures.js";
import { showSlider } from "./sliders.js";

const TINT = [120, 92, 255, 255]; // the style sheet makes it translucent
const CLEAR = [0, 0, 0, 0];
const WHITE = [255, 255, 255, 255];
const BLACK = [0, 0, 0, 255];
const KEY_STEPS = 32; // key presses from one side of the picture to the other
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

export class MaskEditor {
  #box = byId("mask-editor");
  #tint = byId("mask-tint");
  #brush = byId("brush");
  #mask = null;
  #rectangle = null;
  #last = null; // where the pointer was, while it paints

  constructor(onChange) {
    const changed = () => {
      this.#show();
      onChange();
    };
    this.#box.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || !event.isPrimary) return; // other fingers would paint lines between them
      this.#box.setPointerCapture(event.pointerId);
      this.#last = this.#at(event);
      this.#paintTo(event);
    });
    this.#box.addEventListener("pointermove", (event) => this.#last && event.isPrimary && this.#paintTo(event));
    for (const end of ["pointerup", "pointercancel"]) {
      this.#box.addEventListener(end, (event) => {
        if (!event.isPrimary) return;
        if (this.#last) changed();
        this.#last = null;
      });
    }
    this.#box.addEventListener("keydown", (event) => this.#onKey(event, changed));
    byId("mask-clear").addEventListener("click", () => (this.#mask.clear(), changed()));
    byId("mask-invert").addEventListener("click", () => (this.#mask.invert(), changed()));
  }

  /** Begin an empty mask for the pictures of a model. */
  reset(model) {
    const [height, width] = givenSidesOf(model);
    this.#mask = new Mask(height, width);
    const [w, h] = [width, height].map((side) => Math.max(1, Math.round(side / 4)));
    this.#rectangle = { x: Math.floor((width - w) / 2), y: Math.floor((height - h) / 2), width: w, height: h };
    Object.assign(this.#tint, { width, height });
    this.#box.style.setProperty("--aspect", `${width} / ${height}`);
    this.#brush.max = Math.max(1, Math.round(Math.min(height, width) / 2));
    this.#brush.value = Math.max(1, Math.round(Math.min(height, width) / 8));
    this.#show();
  }

  /** Whether any pixel is painted. */
  get isPainted() {
    return this.#mask !== null && this.#mask.share > 0;
  }

  /** Return the mask as a PNG in base64: white where the picture is made anew, black where it is kept. */
  png() {
    const canvas = el("canvas", { width: this.#mask.width, height: this.#mask.height });
    this.#mask.draw(canvas, WHITE, BLACK);
    return canvas.toDataURL("image/png").split(",")[1];
  }

  /** Show the width of the brush. */
  showBrush() {
    showSlider(this.#brush, `${this.#brush.value} px`);
  }

  get #paints() {
    return document.querySelector("input[name=tool]:checked").value === "paint";
  }

  /** Return where the pointer is, in pixels of the picture. */
  #at({ clientX, clientY }) {
    const { left, top, width, height } = this.#box.getBoundingClientRect();
    return { x: ((clientX - left) / width) * this.#mask.width, y: ((clientY - top) / height) * this.#mask.height };
  }

  #paintTo(event) {
    const now = this.#at(event);
    this.#mask.stroke(this.#last, now, Number(this.#brush.value), this.#paints);
    this.#last = now;
    this.#show();
  }

  #onKey(event, changed) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const { key } = event;
    if (key in MOVES) {
      this.#move(MOVES[key], event.shiftKey);
      this.#show();
      announce(this.#where);
    } else if ([" ", "Enter", "Delete", "Backspace"].includes(key)) {
      const paints = key === " " || key === "Enter";
      this.#mask.rectangle(this.#rectangle, paints);
      changed();
      announce(`${paints ? "Painted" : "Erased"}. ${byId("mask-share").textContent}`);
    } else return;
    event.preventDefault();
  }

  /** Move the rectangle, or its right and lower sides. */
  #move([dx, dy], resizes) {
    const { width, height } = this.#mask;
    const step = Math.ceil(Math.max(width, height) / KEY_STEPS);
    const area = this.#rectangle;
    const within = (value, least, most) => Math.min(Math.max(value, least), most);
    if (resizes) {
      area.width = within(area.width + dx * step, 1, width - area.x);
      area.height = within(area.height + dy * step, 1, height - area.y);
    } else {
      area.x = within(area.x + dx * step, 0, width - area.width);
      area.y = within(area.y + dy * step, 0, height - area.height);
    }
  }

  get #where() {
    const { x, y, width, height } = this.#rectangle;
    return `Rectangle ${width} by ${height}, columns ${x + 1} to ${x + width}, rows ${y + 1} to ${y + height}`;
  }

  #show() {
    this.#mask.draw(this.#tint, TINT, CLEAR);
    const { x, y, width, height } = this.#rectangle;
    const sides = { left: x / this.#mask.width, top: y / this.#mask.height };
    Object.assign(sides, { width: width / this.#mask.width, height: height / this.#mask.height });
    for (const [side, part] of Object.entries(sides)) byId("mask-rectangle").style[side] = `${100 * part}%`;
    const share = Math.round(100 * this.#mask.share);
    const made = this.isPainted ? `${share || "less than 1"} % is made anew, the rest is kept` : "Nothing is painted";
    byId("mask-share").textContent = this.isPainted ? `${made}.` : `${made}: the whole picture changes.`;
    this.showBrush();
  }
}
