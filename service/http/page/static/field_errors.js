// What the service finds wrong with a field, shown by that field of the form.

import { el } from "./dom.js";
import { sentence } from "./words.js";

let shown = []; // {note, control, describedBy}: what to undo

/**
 * Show errors by the fields that the form has, in place of those shown before; the run shows all of them.
 * @param {{field: string, message: string}[]} errors - of a problem
 * @returns {boolean} whether there are any, and the form shows all of them
 */
export function showFieldErrors(errors) {
  clearFieldErrors();
  for (const { field, message } of errors) {
    const place = placeOf(field) ?? placeOf(field.split(".")[0]); // resample.times: fields of an object can be together
    if (!place || place.closest("[hidden]")) continue;
    const note = el("p", { className: "error", id: `error-${shown.length}` }, sentence(message));
    place.append(note);
    const control = place.querySelector("input, select, [tabindex]");
    const describedBy = control.getAttribute("aria-describedby");
    control.setAttribute("aria-describedby", [describedBy, note.id].filter(Boolean).join(" "));
    control.setAttribute("aria-invalid", "true");
    shown.push({ note, control, describedBy });
  }
  return errors.length > 0 && shown.length === errors.length;
}

function placeOf(field) {
  return document.querySelector(`[data-fields~="${CSS.escape(field)}"]`);
}

/** Remove all errors from the form. */
export function clearFieldErrors() {
  for (const { note, control, describedBy } of shown.reverse()) {
    note.remove();
    control.removeAttribute("aria-invalid");
    if (describedBy === null) control.removeAttribute("aria-describedby");
    else control.setAttribute("aria-describedby", describedBy);
  }
  shown = [];
}
