// Sliders: how far one is filled, and its value as text beside it.

import { byId } from "./dom.js";

/**
 * Show a slider's value.
 * @param {HTMLInputElement} slider - `#x`, whose text is in `#x-value`; `data-off` is the value that means "off"
 * @param {string} text
 */
export function showSlider(slider, text = slider.value === slider.dataset.off ? "off" : slider.value) {
  const part = (slider.value - slider.min) / (slider.max - slider.min || 1);
  slider.style.setProperty("--filled", `${100 * part}%`);
  byId(`${slider.id}-value`).textContent = text;
}
