// Server-Sent Events in the answer to a POST, which EventSource cannot read.

/** Yield `{name, data}` for each event of an answer. Leaving the loop early aborts the request. */
export async function* readEvents(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let parts = []; // of the event that has not ended; joined once, because it may be long
    let last = ""; // its last character: an end may lie between two reads
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (last + value).split("\n\n");
      const rest = blocks.pop();
      if (blocks.length) {
        blocks[0] = parts.join("") + blocks[0];
        parts = [];
      }
      parts.push(rest.slice(0, -1));
      last = rest.slice(-1);
      for (const block of blocks) {
        const fields = Object.fromEntries(block.split("\n").map(field));
        if (fields.data) yield { name: fields.event, data: JSON.parse(fields.data) };
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // the connection may be closed already
  }
}

function field(line) {
  const colon = line.indexOf(":");
  return [line.slice(0, colon), line.slice(colon + 1).trimStart()];
}
