// Numbers, names and errors as text for users.

/** Return seconds with a useful number of digits. */
export function duration(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

/** Return "1 image", "3 images". */
export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

/** Return the name of a sampler for users. */
export function samplerTitle(name) {
  const title = name.replace(/\b(ddim|dpm|sde)\b/g, (abbreviation) => abbreviation.toUpperCase());
  return title.charAt(0).toUpperCase() + title.slice(1);
}

/** Describe an error to a user who does not know HTTP: a title, and what to do. */
export function explain(error) {
  if (error.name === "TypeError" || error.name === "NetworkError") {
    return { title: "No answer from the service", text: "It may have stopped, or the connection broke. Try again." };
  }
  const { status, detail = error.message, retryAfter } = error;
  const when = retryAfter ? `Try again in about ${duration(retryAfter)}.` : "Try again in a moment.";
  if (status === 401) return { title: "A key is needed", text: "Try again to enter one." };
  if (status === 413) return { title: "The picture is too large", text: sentence(detail) };
  if (status === 429) return { title: "You have reached a limit", text: `${sentence(detail)} ${when}` };
  if (status === 503) return { title: "The service is busy", text: when };
  if (status === 504) return { title: "It took too long", text: "Ask for fewer images or steps." };
  if ([400, 403, 404, 409, 422].includes(status)) return { title: "This cannot be generated", text: sentence(detail) };
  return { title: "Something went wrong in the service", text: sentence(detail) };
}

/** Return a text with a capital letter and a full stop. */
export function sentence(text) {
  const capital = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(capital) ? capital : `${capital}.`;
}
