// The image before its first step: noise.

/** Fill a canvas with grey noise. */
export function drawNoise(canvas) {
  const context = canvas.getContext("2d");
  const noise = context.createImageData(canvas.width, canvas.height);
  for (let k = 0; k < noise.data.length; k += 4) {
    const spread = Math.random() + Math.random() + Math.random() - 1.5; // approximately normal
    noise.data.set([128 + 90 * spread, 128 + 90 * spread, 128 + 90 * spread, 255], k);
  }
  context.putImageData(noise, 0, 0);
}
