// A bar chart with one bar per bucket of a histogram.

import { svg } from "./dom.js";

const WIDTH = 280;
const HEIGHT = 88;
const FOOT = 16;
const GAP = 2;

/**
 * Draw a histogram from its first bucket to its last; heights are relative to the highest bar.
 * @param {SVGElement} into
 * @param {{upTo: number, count: number}[]} buckets
 * @param {string} name - what is counted, for screen readers
 */
export function drawBars(into, buckets, name) {
  const highest = Math.max(1, ...buckets.map(({ count }) => count));
  const step = WIDTH / Math.max(1, buckets.length);
  const labelEvery = Math.ceil(buckets.length / 8);
  const room = HEIGHT - FOOT;
  const bars = buckets.map(({ upTo, count }, k) => {
    const height = count ? Math.max(2, (count / highest) * (room - 4)) : 1;
    const bar = { x: k * step + GAP / 2, y: room - height, width: step - GAP, height, rx: Math.min(2, height / 2) };
    const title = svg("title", {}, `up to ${short(upTo)}: ${count}`);
    return svg("rect", { class: count ? "bar" : "bar none", ...bar }, title);
  });
  const labels = buckets.map(({ upTo }, k) =>
    k % labelEvery ? "" : svg("text", { x: (k + 0.5) * step, y: HEIGHT - 3, "text-anchor": "middle" }, short(upTo)),
  );
  into.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
  into.setAttribute("aria-label", `${name}: ${spoken(buckets)}`);
  into.replaceChildren(...bars, ...labels);
}

function spoken(buckets) {
  const filled = buckets.filter(({ count }) => count);
  return filled.map(({ upTo, count }) => `${count} up to ${short(upTo)}`).join(", ") || "nothing yet";
}

function short(bound) {
  return bound === Infinity ? "∞" : String(bound).replace(/^0\./, ".");
}
