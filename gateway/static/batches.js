// The page of batches: files are handed over, worked off while one watches or not, and fetched.
//
// The newest batches that are active are followed by their tails; the list is asked for again now and
// then, for those that others hand over or that are too many to be followed.

import { BatchView, ENDED } from "./batch.js";
import { followBatch, HeadraceError } from "./headrace.js";
import { $, announce, authorization, BASE_URL, call, failureFrom, lost } from "./page.js";
import { openKey } from "./store.js";
import { describeFailure } from "./wording.js";

const SHOWN = 50;
/** A browser opens six connections to one origin; the others are for everything else. */
const MAX_FOLLOWED = 3;
const LIST_EVERY_MS = 5000;
const MAX_FIRST_LINE_BYTES = 4 * 1024 * 1024;
const MAX_NAME_LENGTH = 512;

const store = openKey();
/** By id: the view of each batch that is shown. */
const views = new Map();
/** By id: what ends the following of each batch that is followed. */
const followed = new Map();

start();

function start() {
  $("api-key").value = store.loadApiKey();
  $("api-key").addEventListener("change", () => {
    store.saveApiKey($("api-key").value.trim());
    for (const abort of followed.values()) abort.abort();
    followed.clear();
    showProblem(null);
    list();
  });
  $("file").addEventListener("change", () => {
    submitAll([...$("file").files]);
    $("file").value = ""; // the same file may be chosen again
  });
  connectDrop();
  list();
  setInterval(() => document.hidden || list(), LIST_EVERY_MS);
}

// Handing over ------------------------------------------------------------------------------------

function connectDrop() {
  const isFile = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0; // `dragleave` comes for each element on the way
  const mark = (change) => {
    depth = Math.max(0, depth + change);
    $("drop").classList.toggle("over", depth > 0);
  };
  addEventListener("dragenter", (event) => isFile(event) && mark(1));
  addEventListener("dragleave", (event) => isFile(event) && mark(-1));
  addEventListener("dragover", (event) => isFile(event) && event.preventDefault());
  addEventListener("drop", (event) => {
    if (!isFile(event)) return;
    event.preventDefault(); // else the browser would leave this page and show the file
    mark(-depth);
    submitAll([...event.dataTransfer.files]);
  });
}

async function submitAll(files) {
  showProblem(null);
  for (const file of files) {
    try {
      show(await submit(file));
      announce(`${file.name} is handed over.`);
    } catch (error) {
      showProblem(error);
      return;
    } finally {
      $("upload").hidden = true;
    }
  }
}

async function submit(file) {
  const endpoint = await endpointOf(file);
  const input = await upload(file);
  return call("POST", "/v1/batches", {
    input_file_id: input.id,
    endpoint,
    completion_window: "24h",
    metadata: { name: file.name.slice(0, MAX_NAME_LENGTH) },
  });
}

/** Where the first line goes: all lines go to the same place. */
async function endpointOf(file) {
  const start = await file.slice(0, MAX_FIRST_LINE_BYTES).text();
  try {
    const { url } = JSON.parse(start.split("\n", 1)[0]);
    if (typeof url === "string") return url;
  } catch {
    // said below
  }
  throw new HeadraceError("NO_REQUESTS", `The first line of ${file.name} is no request with a url.`);
}

/** `fetch` does not tell how much was sent. */
function upload(file) {
  const form = new FormData();
  form.append("purpose", "batch");
  form.append("file", file);
  const bar = $("upload-bar");
  bar.value = 0;
  bar.labels[0].textContent = `Uploading ${file.name}`;
  $("upload").hidden = false;
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.upload.addEventListener("progress", ({ loaded, total }) => (bar.value = loaded / total));
    request.addEventListener("error", () => reject(lost()));
    request.addEventListener("load", () => {
      const { status, response } = request;
      if (status === 200) resolve(response);
      else reject(failureFrom(status, response));
    });
    request.open("POST", `${BASE_URL}/v1/files`);
    request.responseType = "json";
    for (const [name, value] of Object.entries(authorization())) request.setRequestHeader(name, value);
    request.send(form);
  });
}

// Watching ----------------------------------------------------------------------------------------

async function list() {
  try {
    const { data } = await call("GET", `/v1/batches?limit=${SHOWN}`);
    for (const batch of data.toReversed()) show(batch);
    $("none").hidden = data.length > 0;
    if ($("problem").dataset.of === "list") showProblem(null);
  } catch (error) {
    showProblem(error, "list");
  } finally {
    $("batches").removeAttribute("aria-busy");
  }
}

/** Shows a batch as it is now, a new one at the top, and follows it while it is active. */
function show(batch) {
  let view = views.get(batch.id);
  if (!view) {
    view = new BatchView(batch, { announce, cancel, download });
    views.set(batch.id, view);
    $("batches").prepend(view.item);
    $("none").hidden = true;
  }
  view.show(batch);
  if (!ENDED.includes(batch.status)) follow(view);
}

async function follow(view) {
  const { id } = view;
  if (followed.has(id) || followed.size >= MAX_FOLLOWED) return;
  const abort = new AbortController();
  followed.set(id, abort);
  const headers = authorization();
  const onBatch = (batch) => view.show(batch);
  const onState = (state) => view.showConnection(state);
  try {
    await followBatch({ baseUrl: BASE_URL, id, headers, onBatch, onState, signal: abort.signal });
  } catch (error) {
    if (!abort.signal.aborted) showProblem(error);
  } finally {
    if (followed.get(id) === abort) followed.delete(id);
  }
}

async function cancel(view) {
  if (!confirm(`Cancel ${view.name}? What is finished is kept.`)) return;
  try {
    view.show(await call("POST", `/v1/batches/${view.id}/cancel`));
  } catch (error) {
    showProblem(error);
  }
}

// Fetching ----------------------------------------------------------------------------------------

/** A link can not carry a key: then the file comes by a call of ours. */
async function download(event) {
  const link = event.currentTarget;
  if (!$("api-key").value.trim()) return;
  event.preventDefault();
  try {
    const response = await fetch(link.href, { headers: authorization(), cache: "no-store" });
    if (!response.ok) throw failureFrom(response.status, await response.json().catch(() => null));
    const copy = document.createElement("a");
    copy.href = URL.createObjectURL(await response.blob());
    copy.download = link.download;
    copy.click();
    URL.revokeObjectURL(copy.href);
  } catch (error) {
    showProblem(error instanceof HeadraceError ? error : lost());
  }
}

// Words -------------------------------------------------------------------------------------------

/** `of` says whose problem it is, so that who has it no more can take it away; null: there is none. */
function showProblem(error, of = "") {
  const box = $("problem");
  box.hidden = !error;
  box.dataset.of = of;
  if (!error) return;
  const isOurs = !(error instanceof HeadraceError);
  if (isOurs) console.error(error);
  const code = isOurs ? "PAGE_ERROR" : error.code;
  const [sentence, codeShown] = box.children;
  sentence.textContent = describeFailure({ code, message: error.message });
  codeShown.textContent = code;
  if (code === "INVALID_API_KEY" && !$("settings").open) {
    $("settings").open = true;
    $("api-key").focus();
  }
}
