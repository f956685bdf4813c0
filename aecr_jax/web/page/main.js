// The page: takes a picture, lets the worker restore it, and shows, compares and saves the result.

import { encode, makePreview, readPicture } from "./pictures.js";
import { blend } from "./restore.js";
import { connectSlider } from "./slider.js";

const LIMIT = 50e6; // pixels; the page needs about 30 bytes for each
const PREVIEW = 2e6; // pixels of what is shown
const STAGES = { loading: "Loading the model, once", estimating: "Estimating the haze", restoring: "Restoring" };

const ui = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

let models = [];
let worker = null; // is replaced after a run was cancelled, because a run of the model cannot be interrupted
let running = false;
let opened = 0; // counts the pictures, so that one that is decoded slowly does not replace a later one
let current = null; // { name, original, restored, previews: { original, restored }, seconds, model }

// ---- choosing a picture

async function open(file) {
  cancel();
  const number = ++opened;
  showProblem("");
  ui.status.textContent = `Reading ${file.name}`;
  try {
    const original = await readPicture(file, LIMIT);
    if (number !== opened) return;
    current = { name: file.name, original, restored: null, previews: { original: makePreview(original, PREVIEW) } };
    ui.result.hidden = false;
    showPicture(ui.before, current.previews.original);
    showResult();
    restore();
  } catch (error) {
    if (number !== opened) return;
    ui.status.textContent = "";
    showProblem(error.message);
    if (current && !current.restored) showResult();
  }
}

async function openSample(path) {
  const number = ++opened;
  try {
    const response = await fetch(path);
    if (!response.ok) throw new Error(`The sample could not be loaded (status ${response.status}).`);
    const sample = new File([await response.blob()], path.split("/").pop());
    if (number === opened) open(sample);
  } catch (error) {
    if (number === opened) showProblem(error.message);
  }
}

/** Open the first file of a drop or a paste; text and links have none. */
function openFirst(event, transfer) {
  const [file] = transfer.files;
  if (file) {
    event.preventDefault();
    open(file);
  }
}

function connectInputs() {
  ui.file.addEventListener("change", () => {
    const [file] = ui.file.files;
    if (file) open(file);
    ui.file.value = ""; // so that the same file can be chosen again
  });
  for (const button of document.querySelectorAll(".sample")) button.addEventListener("click", () => openSample(button.dataset.file));
  document.addEventListener("paste", (event) => openFirst(event, event.clipboardData));
  // The whole window takes files: dropped beside the marked area, the browser would leave the page and show the file.
  for (const type of ["dragenter", "dragover"]) {
    window.addEventListener(type, (event) => {
      event.preventDefault();
      ui.drop.classList.add("over");
    });
  }
  window.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) ui.drop.classList.remove("over");
  });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    ui.drop.classList.remove("over");
    openFirst(event, event.dataTransfer);
  });
}

// ---- restoring

function restore() {
  cancel();
  const model = models[ui.model.selectedIndex];
  const { original } = current;
  Object.assign(current, { restored: null, model: model.name });
  showResult();
  worker ??= makeWorker();
  setRunning(true);
  // The data are copied: the page needs them to compare, to blend and to save.
  worker.postMessage({ model, picture: { width: original.width, height: original.height, data: original.data } });
}

function makeWorker() {
  const made = new Worker("worker.js", { type: "module" });
  made.onmessage = ({ data: message }) => {
    if (made !== worker) return; // posted before the run was cancelled
    if (message.stage) showProgress(message);
    else finish(message);
  };
  made.onerror = (event) => {
    event.preventDefault();
    if (made === worker) finish({ problem: `The model could not be started (${event.message || "a file of the page is missing"}).` });
  };
  return made;
}

function finish({ data, seconds, problem }) {
  const focused = document.activeElement === ui.cancel;
  setRunning(false);
  if (problem) {
    worker.terminate();
    worker = null;
    ui.status.textContent = "";
    showProblem(problem);
    ui.again.hidden = false;
    if (focused) ui.again.focus();
    return;
  }
  const { width, height } = current.original;
  current.restored = { width, height, data };
  current.previews.restored = makePreview(current.restored, PREVIEW);
  current.seconds = seconds;
  ui.status.textContent = `Restored in ${formatSeconds(seconds)}`;
  showResult();
  if (focused) ui.png.focus();
}

function cancel() {
  if (!running) return;
  worker.terminate();
  worker = null;
  setRunning(false);
}

function setRunning(value) {
  running = value;
  ui.cancel.hidden = ui.progress.hidden = !value;
  ui.result.setAttribute("aria-busy", value);
  if (value) {
    showProblem("");
    showProgress({ stage: "loading" });
    ui.again.hidden = true;
  }
}

function showProgress({ stage, done, total }) {
  if (ui.status.textContent !== STAGES[stage]) ui.status.textContent = STAGES[stage]; // screen readers announce each change
  if (total) ui.progress.value = done / total;
  else ui.progress.removeAttribute("value");
}

// ---- showing and saving

function showProblem(text) {
  ui.problem.textContent = text;
}

function showPicture(canvas, picture) {
  Object.assign(canvas, { width: picture.width, height: picture.height });
  canvas.getContext("2d").putImageData(new ImageData(picture.data, picture.width), 0, 0);
}

/** Show the restored picture with the chosen strength if there is one, and otherwise the original alone. */
function showResult() {
  const { original, restored, previews, model, seconds } = current;
  for (const element of [ui.after, ui.split, ui.handle]) element.hidden = !restored;
  ui.compare.classList.toggle("comparing", Boolean(restored));
  ui.png.disabled = ui.jpeg.disabled = !restored;
  ui.again.hidden = Boolean(restored) || running;
  ui.saved.textContent = "";
  const size = `${original.width} × ${original.height} pixels (${((original.width * original.height) / 1e6).toFixed(1)} megapixels)`;
  ui.facts.textContent = restored ? `${size}, restored by ${model} in ${formatSeconds(seconds)}` : size;
  if (restored) showPicture(ui.after, blended(previews.original, previews.restored));
}

function blended(original, restored) {
  const { width, height } = original;
  return { width, height, data: blend(original.data, restored.data, ui.strength.value / 100) };
}

function formatSeconds(seconds) {
  return seconds < 10 ? `${seconds.toFixed(1)} s` : `${Math.round(seconds)} s`;
}

async function save(type, extension) {
  const name = `${current.name.replace(/\.[^.]*$/, "")}_dehazed.${extension}`;
  ui.saved.textContent = "";
  try {
    const file = await encode(blended(current.original, current.restored), type);
    const url = URL.createObjectURL(file);
    Object.assign(document.createElement("a"), { href: url, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60_000); // the browser may still be reading it
    ui.saved.textContent = `${name}, ${(file.size / 1e6).toFixed(1)} MB`;
  } catch (error) {
    showProblem(error.message);
  }
}

function connectResult() {
  connectSlider(ui.compare, ui.split);
  ui.strength.addEventListener("input", () => {
    ui["strength-shown"].textContent = `${ui.strength.value}%`;
    if (current?.restored) showResult();
  });
  ui.model.addEventListener("change", () => {
    showPurpose();
    if (current) restore();
  });
  ui.again.addEventListener("click", () => {
    restore();
    ui.cancel.focus(); // the button that had the focus is hidden now
  });
  ui.cancel.addEventListener("click", () => {
    cancel();
    ui.status.textContent = "Cancelled";
    ui.again.hidden = false;
    ui.again.focus();
  });
  ui.png.addEventListener("click", () => save("image/png", "png"));
  ui.jpeg.addEventListener("click", () => save("image/jpeg", "jpg"));
}

function showPurpose() {
  const { purpose, parameters, bytes } = models[ui.model.selectedIndex];
  ui.purpose.textContent = `${purpose} (${parameters.toLocaleString("en")} parameters, ${(bytes / 1e6).toFixed(1)} MB)`;
}

// ---- start

async function start() {
  ui["not-started"].hidden = true;
  try {
    const response = await fetch("models/models.json");
    if (!response.ok) throw new Error(`status ${response.status}`);
    const listing = await response.json();
    models = listing.models;
    ui.version.textContent = `aecr-jax ${listing.version}`;
  } catch (error) {
    showProblem(`The list of models could not be loaded (${error.message}): write the page again with the command web.`);
    return;
  }
  ui.model.append(...models.map(({ name }) => new Option(name)));
  showPurpose();
  connectInputs();
  connectResult();
  document.body.dataset.ready = "true";
}

start();
