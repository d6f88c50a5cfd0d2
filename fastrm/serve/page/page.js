// The page of a reward server: one prompt with its images and answers, their ranking, and what the server does.
"use strict";

const MIN_ANSWERS = 2;
const MAX_ANSWERS = 8;
const POLL_MILLISECONDS = 2000;
const SVG = "http://www.w3.org/2000/svg";
const TOKEN_KEY = "fastrm-token"; // of sessionStorage: it ends with the tab

const byId = (id) => document.getElementById(id);
/** @type {{name: string, type: string, uri: string}[]} */
const images = [];
let reading = Promise.resolve();
let tokenWanted = false;

/** Return a new element; `parts` are strings, which stay text whatever they hold, and elements. */
function element(tag, attributes = {}, ...parts) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...parts);
  return made;
}

// Asking the server

class ServerError extends Error {}

/** Return the JSON of an answer, or throw a ServerError that says in words why there is none. */
async function ask(path, body) {
  const headers = byId("token").value ? { Authorization: `Bearer ${byId("token").value}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const options = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new ServerError("The server does not answer. Is it still running, and is the network there?");
  }
  const content = await answer.json().catch(() => null);
  if (answer.ok && content !== null) return content;
  if (answer.status === 401) {
    showToken();
    throw new ServerError(byId("token").value ? "The server refuses this token." : "The server wants a token.");
  }
  throw new ServerError(inWords(answer, content));
}

function inWords(answer, content) {
  const said = describe(content?.error ?? content?.detail);
  if (answer.status !== 503) return said || `The server answered with status ${answer.status} and no reason.`;
  const seconds = answer.headers.get("Retry-After");
  const again = seconds ? `Try again in ${seconds} s.` : "Try again soon.";
  return `The server has too much to do. ${again}${said ? ` It says: ${said}` : ""}`;
}

/** Return an error of the server as a line: its message, and its code for those who look it up. */
function describe(error) {
  if (!error) return "";
  if (typeof error === "string") return error;
  const message = error.message ?? JSON.stringify(error);
  return error.code ? `${message} (${error.code})` : message;
}

function showToken() {
  tokenWanted = true;
  byId("token-row").hidden = false;
}

// Images and answers

/** Read files and show them, in the order in which they were given; `reading` ends when all are there. */
function addFiles(files) {
  reading = Promise.all([reading, ...[...files].map(readImage)]).then(([, ...read]) => {
    images.push(...read.filter(Boolean));
    showImages();
  });
}

/** Return an image's name, type and data URI; say why and return null where it is none. */
async function readImage(file) {
  if (!file.type.startsWith("image/")) {
    showError(`${file.name || "What you gave"} is not an image.`);
    return null;
  }
  const reader = new FileReader();
  return new Promise((resolve) => {
    reader.onload = () => resolve({ name: file.name || "pasted.png", type: file.type, uri: reader.result });
    reader.onerror = () => {
      showError(`${file.name} could not be read.`);
      resolve(null);
    };
    reader.readAsDataURL(file);
  });
}

function showImages() {
  byId("thumbnails").replaceChildren(...images.map((image, number) => {
    const remove = element("button", { type: "button", "aria-label": `Remove image ${image.name}` }, "Remove");
    remove.onclick = () => {
      images.splice(number, 1);
      showImages();
      byId("files").focus();
    };
    return element("li", {}, element("img", { src: image.uri, alt: image.name }), image.name, remove);
  }));
}

const answerFields = () => [...byId("answers").querySelectorAll("textarea")];

function addAnswer() {
  const item = element("li", {}, element("label"), element("textarea", { rows: 2 }),
    element("button", { type: "button" }, "Remove"));
  item.querySelector("button").onclick = () => {
    item.remove();
    numberAnswers();
    answerFields().at(-1).focus();
  };
  byId("answers").append(item);
  numberAnswers();
}

/** Number the answers that there are, and let none be removed or added beyond the limits. */
function numberAnswers() {
  const items = [...byId("answers").children];
  items.forEach((item, place) => {
    const [label, field, remove] = item.children;
    label.textContent = `Answer ${place + 1}`;
    field.id = label.htmlFor = `answer-${place + 1}`;
    remove.setAttribute("aria-label", `Remove answer ${place + 1}`);
    remove.hidden = items.length <= MIN_ANSWERS;
  });
  byId("add").hidden = items.length >= MAX_ANSWERS;
}

// Scoring

async function score(event) {
  event.preventDefault();
  if (byId("score").disabled) return; // the keys ask while the last answer is still awaited
  showError("");
  const group = { prompt: byId("prompt").value, responses: answerFields().map((field) => field.value) };
  const empty = answerFields().find((field) => !field.value.trim());
  const missing = group.prompt.trim() ? empty : byId("prompt");
  if (missing) {
    showError(missing === empty ? `Answer ${answerFields().indexOf(empty) + 1} is empty.` : "The prompt is empty.");
    missing.focus();
    return;
  }
  byId("score").disabled = true;
  byId("summary").textContent = "Scoring …";
  try {
    await reading;
    const sent = images.slice();
    const whole = sent.length ? { ...group, images: sent.map((image) => image.uri) } : group;
    const started = performance.now();
    const [rewards] = (await ask("v1/rewards", { groups: [whole] })).rewards;
    if (!Array.isArray(rewards)) throw new ServerError(describe(rewards?.error ?? rewards));
    showRanking(group.responses, rewards, performance.now() - started);
    showExamples(group, sent);
  } catch (error) {
    byId("summary").textContent = "No rewards.";
    byId("ranking").replaceChildren();
    byId("examples").hidden = true;
    showError(error instanceof ServerError ? error.message : `The page failed: ${error.message}`);
    if (tokenWanted && !byId("token").value) byId("token").focus();
  } finally {
    byId("score").disabled = false;
    showServer();
  }
}

function showRanking(answers, rewards, milliseconds) {
  const ranked = answers.map((answer, number) => ({ answer, number, reward: rewards[number] }));
  ranked.sort((one, other) => other.reward - one.reward || one.number - other.number);
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  byId("ranking").replaceChildren(...ranked.map(({ answer, number, reward }) => {
    const rank = 1 + rewards.filter((other) => other > reward).length; // equal rewards share a rank
    const behind = rank === 1 ? "best" : `${(ranked[0].reward - reward).toFixed(3)} behind the best`;
    const line = element("div", { class: "line" }, element("span", { class: "rank" }, `${rank}.`),
      element("span", { class: "answer" }, answer),
      element("span", { class: "reward" }, reward.toFixed(3).replace("-", "\u2212"), element("span", { class: "behind" }, behind)));
    const item = element("li", { "data-answer": number + 1, "data-reward": reward }, line, bar(reward, low, high));
    if (rank === 1) item.className = "first";
    return item;
  }));
  const ties = rewards.filter((reward) => reward === ranked[0].reward).length;
  const best = ties > 1 ? `${ties} answers share the first place` : `Answer ${ranked[0].number + 1} is best`;
  byId("summary").textContent = `${best}; scored in ${milliseconds.toFixed(0)} ms.`;
}

/**
 * Return a reward as a bar. Only differences of rewards mean something, so the best has the whole width, and what
 * another lacks of it is how far it lies behind; a difference below 1 is a small one whatever the others are.
 */
function bar(reward, low, high) {
  const picture = document.createElementNS(SVG, "svg");
  const filled = document.createElementNS(SVG, "rect");
  const width = 100 - 97 * (high - reward) / Math.max(1, high - low);
  const set = (what, attributes) => Object.entries(attributes).forEach(([name, value]) => what.setAttribute(name, value));
  set(picture, { class: "track", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": true });
  set(filled, { width, height: 10 });
  picture.append(filled);
  return picture;
}

function showExamples(group, sent) {
  const url = new URL("v1/rewards", location.href).href;
  byId("curl").textContent = curlExample(url, group, sent, tokenWanted);
  byId("python").textContent = pythonExample(url, group, sent, tokenWanted);
  byId("examples").hidden = false;
}

function showError(text) {
  byId("error").textContent = text;
  byId("error").hidden = !text;
}

async function copy(event) {
  const name = event.target.dataset.copy;
  const text = byId(name).textContent;
  try {
    await navigator.clipboard.writeText(text);
    byId("copied").textContent = `Copied ${name}.`;
  } catch { // without https a browser gives a page of another machine no clipboard
    getSelection().selectAllChildren(byId(name));
    byId("copied").textContent = "The browser does not let this page copy; the text is selected, press Ctrl+C.";
  }
}

// What the server does

async function showModel() {
  try {
    byId("model").textContent = (await ask("v1/models")).data.map((model) => model.id).join(", ");
  } catch (error) {
    byId("model").textContent = error.message;
  }
}

async function showServer() {
  if (tokenWanted && !byId("token").value) return;
  try {
    const now = await ask("activity");
    byId("waiting").textContent = now.waiting;
    byId("rate").textContent = now.rewards_per_second.toFixed(1);
    byId("p50").textContent = milliseconds(now.latency_ms.p50);
    byId("p99").textContent = milliseconds(now.latency_ms.p99);
    if (now.recent.length) byId("recent").replaceChildren(...now.recent.map(recentRow));
  } catch {
    byId("waiting").textContent = byId("rate").textContent = byId("p50").textContent = byId("p99").textContent = "–";
  }
}

const milliseconds = (value) => value === null ? "–" : `${value.toFixed(0)} ms`;

function recentRow(request) {
  const time = new Date(1000 * request.time).toTimeString().slice(0, 8);
  const cells = [time, request.path, request.status, request.rewards, request.ms.toFixed(0)];
  return element("tr", {}, ...cells.map((cell) => element("td", {}, String(cell))));
}

// What a reader does

function listen() {
  byId("form").addEventListener("submit", score);
  byId("add").addEventListener("click", () => {
    addAnswer();
    answerFields().at(-1).focus();
  });
  byId("files").addEventListener("change", (event) => {
    addFiles(event.target.files);
    event.target.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
  });
  document.addEventListener("paste", (event) => addFiles(event.clipboardData.files));
  for (const type of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(type, (event) => {
      if (!event.dataTransfer.types.includes("Files")) return; // text may be dragged into a field
      event.preventDefault(); // else the browser would leave the page for the image
      byId("drop").classList.toggle("over", type === "dragover");
      if (type === "drop") addFiles(event.dataTransfer.files);
    });
  }
  byId("token").addEventListener("change", () => {
    sessionStorage.setItem(TOKEN_KEY, byId("token").value);
    showError("");
    showModel();
    showServer();
  });
  document.querySelectorAll("[data-copy]").forEach((button) => button.addEventListener("click", copy));
}

byId("token").value = sessionStorage.getItem(TOKEN_KEY) ?? "";
if (byId("token").value) showToken();
addAnswer();
addAnswer();
listen();
showModel();
showServer();
setInterval(() => document.hidden || showServer(), POLL_MILLISECONDS);
