// Code that generates the same images elsewhere.

import { hasKey } from "./key.js";

/**
 * @typedef {{url: string, accept: string, file: string, body: object}} Wanted
 */

/** Return the address of the service, as this page reached it. */
export function serviceUrl() {
  return new URL("v1/generate", document.baseURI).href;
}

/** Return a command for a shell. */
export function curl({ url, accept, file, body }) {
  const lines = [
    `curl -s ${quoted(url)}`,
    ...(hasKey() ? [`-H "Authorization: Bearer $API_KEY"`] : []),
    "-H 'Content-Type: application/json'",
    `-H 'Accept: ${accept}'`,
    `-o ${file}`,
  ];
  // A picture can be longer than a shell allows an argument to be
  const data = JSON.stringify(body);
  const [argument, input] = body.image || body.cond ? ["-d @-", ` <<'BODY'\n${data}\nBODY`] : [`-d ${quoted(data)}`, ""];
  return [...lines, argument].join(" \\\n     ") + input;
}

/** Return a program that needs only Python. Bodies contain strings, numbers and objects of them, which JSON and Python write alike. */
export function python({ url, accept, file, body }) {
  const headers = { "Content-Type": "application/json", Accept: accept };
  const key = hasKey() ? [`        "Authorization": "Bearer " + os.environ["API_KEY"],`] : [];
  return [
    "import json",
    ...(hasKey() ? ["import os"] : []),
    "from urllib.request import Request, urlopen",
    "",
    "request = Request(",
    `    ${JSON.stringify(url)},`,
    `    data=json.dumps(${literal(body)}).encode(),`,
    "    headers={",
    ...Object.entries(headers).map(([name, value]) => `        "${name}": "${value}",`),
    ...key,
    "    },",
    ")",
    `with urlopen(request) as answer, open("${file}", "wb") as file:`,
    "    file.write(answer.read())",
  ].join("\n");
}

function literal(body) {
  const items = Object.entries(body).map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`);
  return `{${items.join(", ")}}`;
}

function quoted(text) {
  return `'${text.replaceAll("'", `'\\''`)}'`;
}
