// The request of the page as commands that a reader can copy and run as they stand.
"use strict";

/** Return text in single quotes for a POSIX shell. */
const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return text with what a here-document would expand written so that it stays as it is. */
const plainInHereDocument = (text) => text.replace(/[\\$`]/g, "\\$&");

/** Return texts as a list that JSON and Python read alike. */
const listed = (texts) => `[${texts.map((text) => JSON.stringify(text)).join(", ")}]`;

/**
 * Return a curl command. Images are read from the files of their names when it runs, so that it stays short.
 * @param {string} url of the endpoint.
 * @param {{prompt: string, responses: string[]}} group
 * @param {{name: string, type: string}[]} images
 * @param {boolean} withToken whether the server wants a token, which the command takes from FASTRM_TOKEN.
 */
function curlExample(url, group, images, withToken) {
  const uris = images.map(({ name, type }) => `"data:${type};base64,$(base64 < ${quoted(name)} | tr -d '\\n')"`);
  const parts = [`"prompt": ${plainInHereDocument(JSON.stringify(group.prompt))}`];
  if (images.length) parts.push(`"images": [${uris.join(", ")}]`);
  parts.push(`"responses": ${plainInHereDocument(listed(group.responses))}`);
  const token = withToken ? "\n  -H \"Authorization: Bearer $FASTRM_TOKEN\" \\" : "";
  return `curl -s ${url} \\
  -H 'Content-Type: application/json' \\${token}
  --data-binary @- <<END_OF_REQUEST
{"groups": [{${parts.join(",\n  ")}}]}
END_OF_REQUEST`;
}

/** Return a Python program of the standard library; arguments as for `curlExample`. A JSON string is one of Python. */
function pythonExample(url, group, images, withToken) {
  const lines = [images.length ? "import base64" : "", "import json", withToken ? "import os" : "",
    "import urllib.request", images.length ? "from pathlib import Path" : "", "\n"];
  if (images.length) {
    lines.push("def data_uri(name, kind):",
      "    return f\"data:{kind};base64,{base64.b64encode(Path(name).read_bytes()).decode()}\"\n\n");
  }
  lines.push("group = {", `    "prompt": ${JSON.stringify(group.prompt)},`);
  if (images.length) {
    const uris = images.map(({ name, type }) => `data_uri(${JSON.stringify(name)}, ${JSON.stringify(type)})`);
    lines.push(`    "images": [${uris.join(", ")}],`);
  }
  lines.push(`    "responses": ${listed(group.responses)},`, "}",
    "body = json.dumps({\"groups\": [group]}).encode()",
    "headers = {\"Content-Type\": \"application/json\"}");
  if (withToken) lines.push("headers[\"Authorization\"] = f\"Bearer {os.environ['FASTRM_TOKEN']}\"");
  lines.push(`request = urllib.request.Request(${JSON.stringify(url)}, body, headers)`,
    "print(json.load(urllib.request.urlopen(request))[\"rewards\"][0])");
  return lines.filter(Boolean).join("\n");
}
