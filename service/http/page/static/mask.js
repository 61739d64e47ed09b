// Which pixels of a picture are made anew: the painted ones.

const MADE = 255;
const KEPT = 0;

export class Mask {
  #made; // one byte per pixel, row by row
  #painted = 0; // number of painted pixels

  constructor(height, width) {
    this.height = height;
    this.width = width;
    this.#made = new Uint8Array(height * width);
  }

  /** The part of the pixels that is painted, 0..1. */
  get share() {
    return this.#painted / this.#made.length;
  }

  /** Paint no pixel. */
  clear() {
    this.#made.fill(KEPT);
    this.#painted = 0;
  }

  /** Paint what is not painted, and the reverse. */
  invert() {
    this.#made = this.#made.map((value) => MADE - value);
    this.#painted = this.#made.length - this.#painted;
  }

  /**
   * Paint, or erase, along a line with a round brush; coordinates and diameter are in pixels.
   * @param {{x: number, y: number}} from
   * @param {{x: number, y: number}} to
   */
  stroke(from, to, diameter, paints) {
    const radius = diameter / 2;
    const bounds = (a, b, most) => [
      Math.max(0, Math.floor(Math.min(a, b) - radius)),
      Math.min(most, Math.ceil(Math.max(a, b) + radius)),
    ];
    const [left, right] = bounds(from.x, to.x, this.width);
    const [top, bottom] = bounds(from.y, to.y, this.height);
    for (let y = top; y < bottom; y++) {
      for (let x = left; x < right; x++) {
        const centre = { x: x + 0.5, y: y + 0.5 };
        if (distance(centre, from, to) <= radius) this.#set(x, y, paints);
      }
    }
    this.#set(Math.floor(to.x), Math.floor(to.y), paints); // the thinnest brush can miss every centre
  }

  /** Paint, or erase, a rectangle of whole pixels. */
  rectangle({ x, y, width, height }, paints) {
    for (let row = y; row < y + height; row++) {
      for (let column = x; column < x + width; column++) this.#set(column, row, paints);
    }
  }

  /** Draw on a canvas of the mask's size: one colour, [r, g, b, a], for painted pixels, and one for the others. */
  draw(canvas, painted, others) {
    const context = canvas.getContext("2d");
    const pixels = context.createImageData(this.width, this.height);
    const colours = new Uint32Array(pixels.data.buffer);
    const [paint, other] = [painted, others].map((colour) => new Uint32Array(Uint8Array.from(colour).buffer)[0]);
    for (let k = 0; k < colours.length; k++) colours[k] = this.#made[k] === MADE ? paint : other;
    context.putImageData(pixels, 0, 0);
  }

  #set(x, y, paints) {
    if (x < 0 || x >= this.width || y < 0 || y >= this.height) return;
    const [k, value] = [y * this.width + x, paints ? MADE : KEPT];
    if (this.#made[k] === value) return;
    this.#made[k] = value;
    this.#painted += paints ? 1 : -1;
  }
}

/** Return the distance of a point from the line between two points. */
function distance(point, from, to) {
  const [dx, dy] = [to.x - from.x, to.y - from.y];
  const along = ((point.x - from.x) * dx + (point.y - from.y) * dy) / (dx * dx + dy * dy || 1);
  const part = Math.min(1, Math.max(0, along));
  return Math.hypot(point.x - from.x - part * dx, point.y - from.y - part * dy);
}
