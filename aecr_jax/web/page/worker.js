// Runs the models with onnxruntime-web, in a thread of its own.
//
// It receives { model, picture }, where model is an entry of models/models.json and picture is described in restore.js. It posts
// { stage: "loading" | "estimating" | "restoring", done, total } for progress, and at the end { data, seconds } or { problem }.

import { applyMaps, reduce, restoreTiles } from "./restore.js";
import * as ort from "./runtime/ort.wasm.bundle.min.mjs";

const STRIP = 256; // rows between two reports of progress

// Browsers allow several threads only where the server isolates the page (cross-origin isolation), as aecr_jax/web/server.py does.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

let loaded = { file: "", session: null };

self.onmessage = async ({ data: { model, picture } }) => {
  try {
    const session = await load(model);
    const start = performance.now();
    const data = await restore(session, model.form, picture);
    self.postMessage({ data, seconds: (performance.now() - start) / 1000 }, [data.buffer]);
  } catch (error) {
    self.postMessage({ problem: explain(error) });
  }
};

async function load({ file }) {
  if (loaded.file === file) return loaded.session;
  self.postMessage({ stage: "loading" });
  await loaded.session?.release();
  loaded = { file: "", session: null };
  const response = await fetch(file);
  if (!response.ok) throw new Error(`The model could not be loaded (${file}, status ${response.status}).`);
  const session = await ort.InferenceSession.create(await response.arrayBuffer(), { executionProviders: ["wasm"] });
  loaded = { file, session };
  return session;
}

async function restore(session, form, picture) {
  const output = new Uint8ClampedArray(picture.data.length);
  const report = (done, total) => self.postMessage({ stage: "restoring", done, total });
  const run = async (data, width, height) => {
    const [name] = session.outputNames;
    const results = await session.run({ hazy: new ort.Tensor("float32", data, [1, 3, height, width]) });
    return results[name];
  };
  if (form.cell) {
    self.postMessage({ stage: "estimating" });
    const reduced = reduce(picture, form);
    const tensor = await run(reduced.data, reduced.width, reduced.height);
    const maps = { data: tensor.data, width: tensor.dims[3], height: tensor.dims[2] };
    for (let row = 0; row < picture.height; row += STRIP) {
      const end = Math.min(row + STRIP, picture.height);
      applyMaps(picture, maps, form.cell * reduced.reduction, output, row, end);
      report(end, picture.height);
    }
  } else {
    report(0, 1);
    await restoreTiles(picture, form, async (...image) => (await run(...image)).data, output, report);
  }
  return output;
}

function explain(error) {
  const text = String(error?.message ?? error);
  const memory = /memory|alloc|^\d+$/i.test(text); // onnxruntime may throw the address of a C++ exception
  return memory ? "There is not enough memory in this browser for the picture: use a smaller one, or another model." : text;
}
