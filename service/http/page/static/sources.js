// Files from the user: chosen, dropped or pasted, for the parts of the form that take one.

const parts = []; // in the order of the form
let isInstalled = false;

/**
 * Take files for a part of the form.
 * @param {HTMLInputElement} input - chooses a file; its `.drop` and its fieldset take those that are dropped on them
 * @param {(file: File) => void} use
 * @param {() => boolean} isWaiting - whether files that are dropped or pasted elsewhere go here rather than to a later part
 */
export function takeFiles(input, use, isWaiting) {
  parts.push({ use, isWaiting, zone: input.closest(".drop"), fieldset: input.closest("fieldset") });
  input.addEventListener("change", () => {
    const [file] = input.files;
    input.value = ""; // the same file may be chosen again
    if (file) use(file);
  });
  if (!isInstalled) install();
  isInstalled = true;
}

function install() {
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // otherwise the browser leaves the page and opens the file
    mark(partOf(event));
  });
  document.addEventListener("dragleave", ({ relatedTarget }) => relatedTarget || mark(null));
  document.addEventListener("drop", (event) => {
    mark(null);
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    useFirst(event, event.dataTransfer);
  });
  document.addEventListener("paste", (event) => useFirst(event, event.clipboardData));
}

function useFirst(event, { files: [file] }) {
  if (file) partOf(event)?.use(file);
}

function mark(part) {
  for (const { zone } of parts) zone.classList.toggle("over", zone === part?.zone);
}

/** Return the part that a file goes to; null if none takes one now. */
function partOf({ target }) {
  const open = document.querySelector("dialog[open]") ? [] : parts.filter(({ fieldset }) => !fieldset.hidden);
  const under = open.find(({ fieldset }) => fieldset.contains(target));
  return under ?? open.find(({ isWaiting }) => isWaiting()) ?? open.at(-1) ?? null;
}
