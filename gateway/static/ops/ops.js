// The operations page: what the pool does at this moment, what is wrong with it, and what can be done.
//
// One connection, `/ops/feed`, brings an overview a second. While the tab is hidden it is closed; it
// goes on behind the last event, as after a lost connection.

import { followFeed } from "../headrace.js";
import { $, announce, authorization, BASE_URL, call } from "../page.js";
import { openKey } from "../store.js";
import { describeBatchState } from "../wording.js";
import { Banner } from "./banner.js";
import { Charts } from "./charts.js";
import { DeadLetters } from "./dead.js";
import { ask } from "./dialogs.js";
import { Errors } from "./errors.js";
import { History } from "./history.js";
import { Picture } from "./picture.js";
import { showProblem } from "./problem.js";
import { Sheet } from "./sheet.js";
import { Streams } from "./streams.js";
import { age, bytes, clock, count, figure, NOTHING, number, percent, seconds } from "./words.js";

/** The gateway sends something at least every 15 s; a connection that is silent for longer is dead. */
const SILENCE_MS = 20_000;
/** Without a new overview for so long, what is shown is history. */
const STALE_MS = 4000;
const LOOK_MS = 1000;
/** What the banner says as long as no gateway can say anything. */
const WITHOUT_CONNECTION = {
  severity: "warning",
  code: "connection_lost",
  what: "This page has lost its connection to the gateway: what it shows is old.",
  why: "It tries again by itself. Questions may be answered as ever, by another gateway or this one.",
  command: "headrace status",
};

const store = openKey();
const history = new History();
const banner = new Banner();
const picture = new Picture($("picture"), $("picture-words"));
const charts = new Charts($("charts"));
const workers = newWorkers();
const batches = newBatches();
const errors = new Errors($("errors"));
const dead = new DeadLetters($("dead"));
const streams = new Streams($("streams"));

/** Ends the connection that is open; null: none is. */
let connection = null;
/** Behind the last overview. */
let cursor = "";
/** @type {"connecting"|"streaming"|"reconnecting"|"refused"} */
let state = "connecting";
let newest = null;
let newestAt = 0;

start();

function start() {
  $("api-key").value = store.loadApiKey();
  $("api-key").addEventListener("change", () => {
    store.saveApiKey($("api-key").value.trim());
    showProblem(null);
    connect();
  });
  addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  setInterval(() => document.hidden || showState(), LOOK_MS);
  if (!document.hidden) connect();
}

// The feed ----------------------------------------------------------------------------------------

async function connect() {
  disconnect();
  const own = (connection = new AbortController());
  state = "connecting";
  try {
    await followFeed({
      baseUrl: BASE_URL,
      headers: authorization(),
      cursor,
      onHistory: (columns) => history.replace(columns),
      onOverview: (overview, progress) => {
        cursor = progress.cursor;
        show(overview);
      },
      onState: (told) => {
        state = told;
        if (told === "reconnecting") banner.show([WITHOUT_CONNECTION]);
        showState();
      },
      signal: own.signal,
      silenceMs: SILENCE_MS,
      giveUpAfterMs: Infinity,
    });
  } catch (error) {
    if (own.signal.aborted) return;
    state = "refused";
    showState();
    showProblem(error, "feed");
  }
}

function disconnect() {
  connection?.abort();
  connection = null;
}

function show(overview) {
  if (newest?.at !== overview.at) newestAt = performance.now();
  if (!newest) document.querySelector("main").removeAttribute("aria-busy");
  if ($("problem").dataset.of === "feed") showProblem(null);
  newest = overview;
  history.add(overview);
  banner.show(overview.diagnosis);
  picture.mark(banner.severities);
  picture.show(overview);
  showModel(overview);
  showFigures(overview);
  workers.show(overview.workers);
  batches.show(overview.batches);
  errors.show(overview.errors);
  dead.show(overview.dead_letters);
  streams.show(overview.streams);
  charts.show(history);
  showState();
}

function showModel({ model, model_version: version }) {
  const text = version ? `${model} · ${version}` : model;
  if ($("model").textContent !== text) $("model").textContent = text;
  $("model").title = text;
}

/** Says whether what is shown is now, and if not, why not. */
function showState() {
  const [name, text] = describeState();
  const feed = $("feed");
  if (feed.dataset.state !== name) turnFeedTo(name, text);
  document.body.classList.toggle("is-old", name === "lost" || name === "stale");
  const shown = feed.firstElementChild;
  if (shown.textContent !== text) shown.textContent = text;
}

/** Its words may change each second; who listens is told when it is another case, a loss by the banner. */
function turnFeedTo(name, text) {
  const feed = $("feed");
  const isFirst = feed.dataset.state === "connecting";
  if (!isFirst && name !== "lost") announce(text);
  feed.dataset.state = name;
}

/** @returns {[name: "live"|"stale"|"lost"|"connecting", text: string]} */
function describeState() {
  const since = newest ? ` Shown is ${clock(newest.at)}.` : "";
  if (state === "refused") return ["lost", `Not connected.${since}`];
  if (state === "reconnecting") return ["lost", `Connection lost, trying again…${since}`];
  if (!newest) return ["connecting", "Connecting…"];
  const quietMs = performance.now() - newestAt;
  if (quietMs <= STALE_MS) return ["live", "Live"];
  return ["stale", `Nothing new for ${age(Math.floor(quietMs / 1000))}.${since}`];
}

// Figures -----------------------------------------------------------------------------------------

/** The five figures of teaching texts, under their names. */
function showFigures({ stats }) {
  const told = [
    ["Queue time", seconds(stats.queue_time)],
    ["Generation time", seconds(stats.generation_time)],
    ["Tokens per second", figure(stats.tokens_per_second)],
    ["Error rate", percent(stats.error_rate)],
    ["Model version", stats.model_version || NOTHING],
  ];
  const list = $("figures");
  while (list.children.length < told.length) {
    const group = list.appendChild(document.createElement("div"));
    group.append(document.createElement("dt"), document.createElement("dd"));
  }
  told.forEach(([name, value], index) => {
    const [term, description] = list.children[index].children;
    if (term.textContent !== name) term.textContent = name;
    if (description.textContent !== value) description.textContent = value;
  });
}

// Workers and batches -----------------------------------------------------------------------------

function newWorkers() {
  const isResting = ({ state }) => state === "draining" || state === "drained";
  return new Sheet($("workers"), {
    label: "Workers",
    empty: "No worker is running.",
    key: ({ name }) => name,
    state: ({ state }) => state,
    columns: [
      {
        name: "Worker",
        kind: "name",
        text: ({ name }) => name,
        hint: ({ host, pid }) => `on ${host}, process ${pid}`,
      },
      { name: "State", kind: "state", text: ({ state }) => state },
      {
        name: "Model version",
        kind: "code",
        text: ({ model_version: version }) => version || NOTHING,
        hint: ({ model_version: version }) => version,
      },
      {
        name: "Batch",
        kind: "figure",
        text: (worker) => `${figure(worker.batch_size)} of ${worker.max_batch_size}`,
        level: (worker) => worker.batch_size / worker.max_batch_size,
      },
      {
        name: "KV cache",
        kind: "figure",
        text: ({ kv_used: used }) => percent(used),
        level: ({ kv_used: used }) => used,
      },
      { name: "Tokens/s", kind: "figure", text: (worker) => figure(worker.tokens_per_second) },
      { name: "Memory", kind: "figure", text: memory, hint: memoryHint },
      { name: "Heartbeat", kind: "figure", text: ({ heartbeat_age_s: since }) => `${age(since)} ago` },
      {
        name: "",
        buttons: [
          {
            text: (worker) => (isResting(worker) ? "Resume" : "Drain"),
            label: (worker) => `${isResting(worker) ? "Resume" : "Drain"} worker ${worker.name}`,
            isShown: ({ state }) => state !== "dead",
            act: (worker) => (isResting(worker) ? resume(worker) : drain(worker)),
          },
        ],
      },
    ],
  });
}

function memory({ rss_bytes: rss, gpu_mem_bytes: used, gpu_mem_total_bytes: total }) {
  if (!total) return rss ? bytes(rss) : NOTHING;
  return `GPU ${bytes(used)} of ${bytes(total)}`;
}

/** A GPU has the weights and the cache, so its memory is what a worker runs out of. */
function memoryHint({ rss_bytes: rss, gpu_mem_total_bytes: total }) {
  return total ? `of its GPU; its process has ${bytes(rss)} beside that` : "of its process";
}

async function drain({ name, held }) {
  const holds = held
    ? `What it holds (${count(held, "generation", "generations")}) goes on to its end, if need be on another worker.`
    : "It holds nothing.";
  const isSure = await ask(
    `Drain worker ${name}?`,
    `It takes nothing new until it is resumed. ${holds}`,
    "Drain",
  );
  if (isSure) await act(`/ops/workers/${encodeURIComponent(name)}/drain`, `Worker ${name} is drained.`);
}

async function resume({ name }) {
  const isSure = await ask(`Resume worker ${name}?`, "It takes requests again.", "Resume");
  if (isSure)
    await act(`/ops/workers/${encodeURIComponent(name)}/resume`, `Worker ${name} takes requests again.`);
}

async function act(path, done) {
  showProblem(null);
  try {
    await call("POST", path);
    announce(done);
  } catch (error) {
    showProblem(error);
  }
}

function newBatches() {
  const finished = ({ completed, failed }) => completed + failed;
  return new Sheet($("batches"), {
    label: "Batches",
    empty: "No batch is running.",
    key: ({ id }) => id,
    columns: [
      { name: "Batch", kind: "name", text: ({ id }) => id },
      { name: "State", kind: "state", text: ({ status }) => describeBatchState(status) },
      {
        name: "Lines",
        kind: "figure",
        text: (batch) => `${number(finished(batch))} of ${number(batch.total)}`,
        level: (batch) => (batch.total ? finished(batch) / batch.total : 0),
      },
      { name: "Failed", kind: "figure", text: ({ failed }) => number(failed) },
    ],
  });
}
