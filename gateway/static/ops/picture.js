// The way of a request, drawn: request → router → queue → model server → token stream → client, with
// the figures at the places where one looks for them.
//
// One unit of the drawing is one pixel, so its text has the size of the page's; on a narrow screen the
// stations stand below each other. The same figures stand beside it in words, for who can not see it.

import { age, bytes, count, figure, number, percent, seconds } from "./words.js";

const GAP = 30;
const PADDING = 14;
const ROW_HEIGHT = 23;
const HEAD_HEIGHT = 36;
const HEADLINE_HEIGHT = 38;
const TILE = { minWidth: 102, height: 50, gap: 8, inset: 8 };
/** More workers than this are in the table only. */
const MAX_TILES = 60;
/** What of a name fits a tile, in pixels per letter. */
const LETTER = 7;
const WIDTHS = { request: 88, router: 164, queue: 246, workers: 0, stream: 184, client: 204 };
const LAYOUTS = [
  { from: 1180, rows: [["request", "router", "queue", "workers", "stream", "client"]] },
  { from: 700, rows: [["request", "router", "queue"], ["workers"], ["stream", "client"]] },
  { from: 0, rows: [["request"], ["router"], ["queue"], ["workers"], ["stream"], ["client"]] },
];

/** Refusals for want of room or of a budget: nothing is broken, but somebody was sent away. */
const REJECTIONS = [
  "QUEUE_FULL",
  "RATE_LIMITED",
  "QUOTA_EXHAUSTED",
  "BROKER_FULL",
  "NO_WORKERS",
  "DRAINING",
];

export class Picture {
  /**
   * @param {HTMLElement} place  Gets the drawing.
   * @param {HTMLElement} words  A `dl` that gets the same in words.
   */
  constructor(place, words) {
    this.#svg = element("svg", { class: "drawing", role: "img", "aria-labelledby": "picture-title" });
    this.#pipes = this.#svg.appendChild(element("g", { class: "pipes", "aria-hidden": "true" }));
    this.#stations = new Map(STATIONS.map((make) => make()).map((station) => [station.name, station]));
    for (const station of this.#stations.values()) this.#svg.append(station.group);
    place.append(this.#svg);
    this.#words = new Words(words, this.#stations.values());
    new ResizeObserver(([{ contentRect }]) => this.#resize(contentRect.width)).observe(place);
  }

  #svg;
  #pipes;
  /** @type {Map<string, Station>} */
  #stations;
  #words;
  #width = 0;
  #height = 0;

  show(overview) {
    this.#svg.toggleAttribute(
      "data-flows",
      overview.requests.per_s > 0 || overview.requests.running > 0,
    );
    let moved = false;
    for (const station of this.#stations.values()) moved = station.show(overview) || moved;
    if (moved && this.#width) this.#lay();
    this.#words.show();
  }

  /** Marks the stations that a diagnosis is about. @param {Map<string, string>} severities */
  mark(severities) {
    for (const [name, station] of this.#stations) station.mark(severities.get(name) ?? "ok");
  }

  #resize(width) {
    if (!width || width === this.#width) return;
    this.#width = width;
    this.#lay();
  }

  #lay() {
    const rows = LAYOUTS.find(({ from }) => this.#width >= from).rows;
    const stations = rows.map((names) => names.map((name) => this.#stations.get(name)));
    let y = 1;
    for (const row of stations) {
      layRow(row, this.#width, y);
      y += Math.max(...row.map(({ box }) => box.height)) + GAP;
    }
    this.#height = y - GAP + 1;
    this.#svg.setAttribute("viewBox", `0 0 ${this.#width} ${this.#height}`);
    this.#pipes.replaceChildren(...pipesBetween(stations.flat()));
  }
}

/** Gives each station of a row its box; who has no width of its own takes what is left. */
function layRow(row, width, y) {
  const inner = width - 2 - GAP * (row.length - 1);
  const fixed = row.reduce((sum, { name }) => sum + WIDTHS[name], 0);
  const isAlone = row.length === 1;
  const takers = row.filter(({ name }) => !WIDTHS[name]);
  const stretch = takers.length ? 1 : inner / fixed;
  let x = 1;
  for (const station of row) {
    const own = WIDTHS[station.name] * stretch || inner - fixed;
    const stationWidth = isAlone ? width - 2 : own;
    station.box = { x, y, width: stationWidth, height: station.heightFor(stationWidth) };
    x += stationWidth + GAP;
  }
  const height = Math.max(...row.map(({ box }) => box.height));
  for (const station of row) {
    station.box.y += (height - station.box.height) / 2;
    station.lay();
  }
}

function pipesBetween(stations) {
  return stations.slice(1).map((to, index) => pipe(stations[index].box, to.box));
}

/** From one box to the next: beside it, or below it. */
function pipe(from, to) {
  const middle = (box) => box.y + box.height / 2;
  const centre = (box) => box.x + box.width / 2;
  const isBeside = to.x > from.x + from.width;
  const points = isBeside
    ? [
        [from.x + from.width + 3, middle(from)],
        [to.x - 5, middle(to)],
      ]
    : [
        [centre(from), from.y + from.height + 3],
        [centre(from), to.y - GAP / 2],
        [centre(to), to.y - GAP / 2],
        [centre(to), to.y - 5],
      ];
  const [x, y] = points.at(-1);
  const head = isBeside ? `M${x - 5} ${y - 5}l5 5l-5 5` : `M${x - 5} ${y - 5}l5 5l5 -5`;
  return element("path", {
    class: "pipe",
    d: `M${points.map((point) => point.join(" ")).join("L")}${head}`,
  });
}

// Stations ----------------------------------------------------------------------------------------

/** One box: a title, a large figure with its unit, and rows of a name and a figure. */
class Station {
  /** @type {{x: number, y: number, width: number, height: number}} */
  box = { x: 0, y: 0, width: 0, height: 0 };

  constructor(name, title, { unit = "", rows = [] } = {}) {
    this.name = name;
    this.title = title;
    this.group = element("g", { class: `station ${name}`, "data-severity": "ok" });
    this.frame = this.group.appendChild(element("rect", { class: "frame", rx: 12 }));
    this.sign = this.group.appendChild(element("circle", { class: "sign", r: 4 }));
    this.heading = this.addText("heading", title);
    this.headline = unit ? this.addText("headline") : null;
    this.unit = unit ? this.addText("unit", unit) : null;
    this.rows = rows.map((label) => ({
      label: this.addText("label", label),
      value: this.addText("value"),
    }));
    this.labels = rows;
  }

  addText(className, text = "") {
    const node = this.group.appendChild(element("text", { class: className }));
    node.append(text);
    return node;
  }

  mark(severity) {
    setAttribute(this.group, "data-severity", severity);
  }

  /** @param {string} headline  @param {string[]} values  One for each row. */
  write(headline, values) {
    if (this.headline) setText(this.headline, headline);
    values.forEach((value, index) => setText(this.rows[index].value, value));
    this.facts = [
      ...(this.unit ? [`${headline} ${this.unit.textContent}`] : []),
      ...values.map((value, index) => `${this.labels[index]} ${value}`),
    ];
  }

  get bodyTop() {
    return HEAD_HEIGHT + (this.headline ? HEADLINE_HEIGHT : 0);
  }

  heightFor() {
    return this.bodyTop + this.rows.length * ROW_HEIGHT + (this.rows.length ? PADDING - 4 : 2);
  }

  lay() {
    const { x, y, width, height } = this.box;
    this.group.setAttribute("transform", `translate(${x} ${y})`);
    set(this.frame, { width, height });
    set(this.sign, { cx: width - PADDING - 2, cy: 21 });
    set(this.heading, { x: PADDING, y: 25 });
    if (this.headline) set(this.headline, { x: PADDING, y: HEAD_HEIGHT + 24 });
    if (this.unit) this.layUnit();
    this.rows.forEach(({ label, value }, index) => {
      const baseline = this.bodyTop + index * ROW_HEIGHT + 15;
      set(label, { x: PADDING, y: baseline });
      set(value, { x: width - PADDING, y: baseline });
    });
  }

  /** At the right end, so that it stands still while its figure moves. */
  layUnit() {
    set(this.unit, { x: this.box.width - PADDING, y: HEAD_HEIGHT + 24 });
  }
}

class Request extends Station {
  constructor() {
    super("request", "Request");
    this.facts = [];
  }

  heightFor() {
    return HEAD_HEIGHT + 4;
  }

  show({ requests }) {
    this.facts = [`${count(requests.running, "is", "are")} being worked on`];
    return false;
  }
}

class Router extends Station {
  constructor() {
    super("router", "Router", {
      unit: "requests/s",
      rows: ["Errors/min", "Rejected/min", "Running", "Gateways"],
    });
  }

  show({ requests, errors, gateways }) {
    const sum = (wanted) =>
      errors.reduce(
        (total, { code, count_1m: n }) => total + (REJECTIONS.includes(code) === wanted ? n : 0),
        0,
      );
    this.write(figure(requests.per_s), [
      number(sum(false)),
      number(sum(true)),
      number(requests.running),
      number(gateways.length),
    ]);
    return false;
  }
}

/** A row for each lane: how many wait, the oldest one's age, and how long a new one would wait. */
class Queue extends Station {
  #lanes = [];

  constructor() {
    super("queue", "Queue", { unit: "waiting" });
    const kinds = ["name", "name value", "name value", "name value"];
    this.names = kinds.map((kind, index) =>
      this.addText(kind, ["Lane", "Waiting", "Oldest", "Wait"][index]),
    );
  }

  show({ lanes }) {
    const isNew = lanes.length !== this.#lanes.length;
    while (this.#lanes.length < lanes.length) {
      this.#lanes.push(["lane", "value", "value", "value"].map((kind) => this.addText(kind)));
    }
    while (this.#lanes.length > lanes.length) this.#lanes.pop().forEach((node) => node.remove());
    setText(this.headline, number(lanes.reduce((sum, { depth }) => sum + depth, 0)));
    this.facts = lanes.map((lane, index) => {
      const told = [
        lane.lane,
        number(lane.depth),
        lane.depth ? age(lane.oldest_age_s) : "–",
        age(lane.est_wait_s),
      ];
      told.forEach((text, column) => setText(this.#lanes[index][column], text));
      return `${told[0]}: ${told[1]} waiting, oldest ${told[2]}, estimated wait ${told[3]}`;
    });
    return isNew;
  }

  heightFor() {
    return this.bodyTop + (this.#lanes.length + 1) * ROW_HEIGHT + PADDING - 6;
  }

  lay() {
    super.lay();
    const inner = this.box.width - 2 * PADDING;
    const ends = [0, 0.54, 0.78, 1].map((part) => PADDING + part * inner);
    [this.names, ...this.#lanes].forEach((row, line) =>
      row.forEach((node, column) =>
        set(node, { x: ends[column], y: this.bodyTop + line * ROW_HEIGHT + 13 }),
      ),
    );
  }
}

/** A tile for each worker. */
class Workers extends Station {
  /** @type {Map<string, Tile>} */
  #tiles = new Map();
  #numHidden = 0;

  constructor() {
    super("workers", "Model server", { unit: "tokens/s" });
    this.rest = this.addText("label rest");
  }

  show({ workers }) {
    const shown = workers.slice(0, MAX_TILES);
    this.#numHidden = workers.length - shown.length;
    const isSame = shown.length === this.#tiles.size && shown.every(({ name }) => this.#tiles.has(name));
    if (!isSame) this.#renew(shown);
    for (const worker of shown) this.#tiles.get(worker.name).show(worker);
    setText(this.heading, `Model server · ${count(workers.length, "worker", "workers")}`);
    const rate = figure(workers.reduce((sum, worker) => sum + worker.tokens_per_second, 0));
    setText(this.headline, rate);
    setText(this.rest, this.#numHidden ? `and ${this.#numHidden} more, in the table below` : "");
    const told = workers.map(
      (worker) =>
        `${worker.name}: ${worker.state}, ${batchOf(worker)} in the batch, ` +
        `KV cache ${percent(worker.kv_used)}, ${figure(worker.tokens_per_second)} tokens/s`,
    );
    this.facts = [`${rate} tokens/s`, ...told];
    return !isSame;
  }

  #renew(workers) {
    const names = new Set(workers.map(({ name }) => name));
    for (const [name, tile] of this.#tiles) {
      if (names.has(name)) continue;
      tile.group.remove();
      this.#tiles.delete(name);
    }
    const before = this.#tiles;
    this.#tiles = new Map(workers.map(({ name }) => [name, before.get(name) ?? new Tile(name)]));
    this.group.append(...[...this.#tiles.values()].map(({ group }) => group));
  }

  #grid(width) {
    const inner = width - 2 * PADDING;
    const fitting = Math.max(1, Math.floor((inner + TILE.gap) / (TILE.minWidth + TILE.gap)));
    // Few workers have wide tiles, but never so wide that they look like something else.
    const columns = Math.max(Math.min(fitting, this.#tiles.size), Math.min(fitting, 2), 1);
    return { columns, tileWidth: (inner - TILE.gap * (columns - 1)) / columns };
  }

  heightFor(width) {
    const rows = Math.max(1, Math.ceil(this.#tiles.size / this.#grid(width).columns));
    const grid = rows * (TILE.height + TILE.gap) - TILE.gap;
    return this.bodyTop + grid + PADDING + (this.#numHidden ? ROW_HEIGHT : 0);
  }

  lay() {
    super.lay();
    const { columns, tileWidth } = this.#grid(this.box.width);
    [...this.#tiles.values()].forEach((tile, index) => {
      const x = PADDING + (index % columns) * (tileWidth + TILE.gap);
      const y = this.bodyTop + Math.floor(index / columns) * (TILE.height + TILE.gap);
      tile.lay(x, y, tileWidth);
    });
    set(this.rest, { x: PADDING, y: this.box.height - PADDING });
  }
}

function batchOf(worker) {
  return `${figure(worker.batch_size)} of ${worker.max_batch_size}`;
}

class Tile {
  #width = 0;
  #worker = null;

  constructor(name) {
    this.group = element("g", { class: "tile" });
    this.frame = this.group.appendChild(
      element("rect", { class: "tile-frame", rx: 7, height: TILE.height }),
    );
    this.name = this.group.appendChild(element("text", { class: "tile-name", x: TILE.inset, y: 17 }));
    this.figures = this.group.appendChild(
      element("text", { class: "tile-figures", x: TILE.inset, y: 33 }),
    );
    this.track = this.group.appendChild(
      element("rect", { class: "track", x: TILE.inset, y: 40, height: 4, rx: 2 }),
    );
    this.level = this.group.appendChild(
      element("rect", { class: "level", x: TILE.inset, y: 40, height: 4, rx: 2 }),
    );
    this.hint = this.group.appendChild(element("title"));
    this.title = name;
  }

  show(worker) {
    this.#worker = worker;
    setAttribute(this.group, "data-state", worker.state);
    const isReady = worker.state === "ready";
    const batchShown = `${Math.round(worker.batch_size)}/${worker.max_batch_size}`;
    setText(
      this.figures,
      isReady ? `${batchShown} · ${figure(worker.tokens_per_second)}/s` : worker.state,
    );
    setText(
      this.hint,
      `${worker.name} on ${worker.host}: ${worker.state}, ${batchOf(worker)} in the batch, KV cache ${percent(worker.kv_used)}`,
    );
    this.#showLevel();
  }

  lay(x, y, width) {
    this.#width = width;
    set(this.group, { transform: `translate(${x} ${y})` });
    set(this.frame, { width });
    set(this.track, { width: width - 2 * TILE.inset });
    const fitting = Math.floor((width - 2 * TILE.inset) / LETTER);
    setText(
      this.name,
      this.title.length > fitting ? `${this.title.slice(0, fitting - 1)}…` : this.title,
    );
    this.#showLevel();
  }

  #showLevel() {
    const part = Math.min(1, Math.max(0, this.#worker?.kv_used ?? 0));
    setAttribute(this.level, "width", (part * Math.max(0, this.#width - 2 * TILE.inset)).toFixed(1));
    this.level.classList.toggle("full", part > 0.95);
  }
}

class TokenStream extends Station {
  constructor() {
    super("stream", "Token stream", {
      unit: "streams",
      rows: ["Relay lag p99", "Redis answers in", "Redis memory", "of its limit"],
    });
  }

  show({ streams, gateways, redis }) {
    const lag = gateways.length
      ? Math.max(...gateways.map(({ relay_lag_p99_s: lag }) => lag ?? 0))
      : null;
    const part = redis.max_bytes ? percent(redis.used_bytes / redis.max_bytes) : "no limit";
    const rtt = redis.is_up ? seconds(redis.rtt_s) : "not at all";
    this.write(number(streams), [seconds(lag), rtt, bytes(redis.used_bytes), part]);
    return false;
  }
}

class Client extends Station {
  constructor() {
    super("client", "Client", {
      unit: "first token",
      rows: ["First token p99", "Between tokens p50", "Between tokens p99"],
    });
  }

  show({ latency: { ttft, inter_token: between } }) {
    this.write(seconds(ttft.p50), [seconds(ttft.p99), seconds(between.p50), seconds(between.p99)]);
    return false;
  }
}

const STATIONS = [Request, Router, Queue, Workers, TokenStream, Client].map((kind) => () => new kind());

// Words -------------------------------------------------------------------------------------------

/** The figures as a list, written only while it is open: nobody reads it otherwise. */
class Words {
  #list;
  #stations;
  #details;

  constructor(list, stations) {
    this.#list = list;
    this.#details = list.closest("details");
    this.#stations = [...stations].map((station) => {
      const term = list.appendChild(document.createElement("dt"));
      return { station, term, description: list.appendChild(document.createElement("dd")) };
    });
    this.#details.addEventListener("toggle", () => this.show());
    addEventListener("beforeprint", () => this.show());
  }

  show() {
    if (!this.#details.open) return;
    for (const { station, term, description } of this.#stations) {
      setText(term, station.title);
      setText(description, `${(station.facts ?? []).join("; ")}.`);
    }
  }
}

// Drawing -----------------------------------------------------------------------------------------

function element(name, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  set(node, attributes);
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Only what has changed is painted again. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
