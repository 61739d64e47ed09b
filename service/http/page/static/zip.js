// A zip archive of files that are already compressed (PNG) and are therefore stored unchanged.
// The format is described in PKWARE's APPNOTE.TXT, sections 4.3.7, 4.3.12 and 4.3.16.

const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0xedb88320 : value >>> 1;
  return value;
});
const VERSION = 20;
const UTF8_NAMES = 1 << 11;
const FIRST_OF_1980 = (1 << 5) | 1; // the earliest date there is: equal files give equal archives

/**
 * Pack files.
 * @param {{name: string, bytes: Uint8Array}[]} files
 * @returns {Blob}
 */
export function zip(files) {
  const parts = [];
  const directory = [];
  let offset = 0;
  for (const { name, bytes } of files) {
    const path = new TextEncoder().encode(name);
    const shared = [VERSION, UTF8_NAMES, 0, 0, FIRST_OF_1980].map(u16);
    const sizes = [u32(crc32(bytes)), u32(bytes.length), u32(bytes.length), u16(path.length), u16(0)];
    const header = [u32(0x04034b50), ...shared, ...sizes, path];
    directory.push(u32(0x02014b50), u16(VERSION), ...shared, ...sizes, ...[0, 0, 0].map(u16), u32(0), u32(offset), path);
    parts.push(...header, bytes);
    offset += length(header) + bytes.length;
  }
  const counts = [0, 0, files.length, files.length].map(u16);
  const end = [u32(0x06054b50), ...counts, u32(length(directory)), u32(offset), u16(0)];
  return new Blob([...parts, ...directory, ...end], { type: "application/zip" });
}

function crc32(bytes) {
  let crc = 0xffffffff;
  for (const byte of bytes) crc = CRC_TABLE[(crc ^ byte) & 0xff] ^ (crc >>> 8);
  return (crc ^ 0xffffffff) >>> 0;
}

function u16(value) {
  return Uint8Array.of(value, value >>> 8);
}

function u32(value) {
  return Uint8Array.of(value, value >>> 8, value >>> 16, value >>> 24);
}

function length(parts) {
  return parts.reduce((sum, part) => sum + part.length, 0);
}
