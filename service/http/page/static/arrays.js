// Arrays that the service sends, npy files of uint8 [1, H, W, C], as pictures: browsers show none with two channels, or many.

const LENGTH_AT = 8; // of the header's length, in two bytes, in version 1 of the format
const TEXT_AT = 10;

/** Return the sides of the picture of an array's channels, [height, width]: as many columns as rows, or one more. */
export function sidesOfChannels([height, width], channels) {
  const columns = columnsOf(channels);
  return [height * Math.ceil(channels / columns), width * columns];
}

/** Return the URL of a picture of an array's channels, each in grey, row by row; transparent where there is none. */
export function channelsUrl(bytes) {
  const { height, width, channels, values } = read(bytes);
  const [rows, columns] = sidesOfChannels([height, width], channels);
  return urlOf(rows, columns, (set) => {
    values.forEach((value, k) => {
      const [pixel, channel] = [Math.floor(k / channels), k % channels];
      const [across, down] = [channel % columnsOf(channels), Math.floor(channel / columnsOf(channels))];
      set(down * height + Math.floor(pixel / width), across * width + (pixel % width), value);
    });
  });
}

/** Return the URL of a grey picture of the mean of an array's channels. */
export function meanUrl(bytes) {
  const { height, width, channels, values } = read(bytes);
  return urlOf(height, width, (set) => {
    for (let pixel = 0; pixel < height * width; pixel++) {
      const sum = values.subarray(pixel * channels, (pixel + 1) * channels).reduce((a, b) => a + b, 0);
      set(Math.floor(pixel / width), pixel % width, sum / channels);
    }
  });
}

function columnsOf(channels) {
  return Math.ceil(Math.sqrt(channels));
}

function read(bytes) {
  const begin = TEXT_AT + bytes[LENGTH_AT] + 256 * bytes[LENGTH_AT + 1];
  const header = new TextDecoder().decode(bytes.subarray(TEXT_AT, begin));
  const [, height, width, channels] = header.match(/'shape': \(([^)]*)\)/)[1].split(",").map(Number);
  return { height, width, channels, values: bytes.subarray(begin) };
}

function urlOf(height, width, draw) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(width, height);
  draw((y, x, value) => pixels.data.set([value, value, value, 255], 4 * (y * width + x)));
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL("image/png");
}
