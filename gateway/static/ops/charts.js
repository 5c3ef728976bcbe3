// The charts of the last minutes, drawn by uPlot. Only those that are on the screen are drawn.

import { LANES } from "./history.js";
import { age, clock, figure, NOTHING, number, seconds } from "./words.js";

/* global uPlot */

const HEIGHT = 132;
/** A young pool has few minutes to show; they still fill this much of the axis. */
const MIN_SPAN_S = 120;
const NUM_COLOURS = 6;
/** In pixels of the screen: a line of one is drawn without being outlined first, ten times as fast. */
const LINE_WIDTH = 1;
const CURSOR = "operations";

/** Each line: how it is called, its column in the history, and which colour it has. */
const QUANTILES = (of) => () => [
  { name: "p50", column: `latency.${of}.p50`, colour: 1 },
  { name: "p99", column: `latency.${of}.p99`, colour: 2 },
];
const ONE = (name, column) => () => [{ name, column, colour: 1 }];

/** `least`: as far as the axis goes in any case, so that next to nothing does not look like much. */
const KINDS = [
  { title: "Requests per second", write: figure, lines: ONE("requests/s", "requests.per_s") },
  { title: "Tokens per second", write: figure, lines: ONE("tokens/s", "stats.tokens_per_second") },
  { title: "Time to first token", write: seconds, lines: QUANTILES("ttft") },
  { title: "Time between tokens", write: seconds, lines: QUANTILES("inter_token") },
  { title: "Waiting, by lane", write: number, lines: lanesOf("depth"), least: 4 },
  { title: "Age of the oldest, by lane", write: age, lines: lanesOf("oldest_age_s"), least: 1 },
  { title: "Errors in a minute", write: number, lines: errorLines, least: 4 },
];

export class Charts {
  /** @param {HTMLElement} place */
  constructor(place) {
    this.#charts = KINDS.map((kind) => new Chart(kind, place));
    const seen = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) {
        const chart = this.#charts.find(({ card }) => card === target);
        chart.isSeen = isIntersecting;
        if (isIntersecting) this.#draw([chart]);
      }
    });
    for (const { card } of this.#charts) seen.observe(card);
    // Asked for here, not at each drawing: that would have the page laid out for each chart anew.
    const sized = new ResizeObserver((entries) => {
      for (const { target, contentRect } of entries) {
        const chart = this.#charts.find(({ canvas }) => canvas === target);
        chart.width = Math.floor(contentRect.width);
        if (chart.isSeen) this.#draw([chart]);
      }
    });
    for (const { canvas } of this.#charts) sized.observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#renew(false));
    // Paper shows them all, in its own colours.
    matchMedia("print").addEventListener("change", ({ matches }) => this.#renew(matches));
  }

  #charts;
  #history = null;

  show(history) {
    this.#history = history;
    this.#draw(this.#charts);
  }

  #draw(charts) {
    if (!this.#history || document.hidden) return;
    for (const chart of charts) if (chart.isSeen) chart.draw(this.#history);
  }

  #renew(isForAll) {
    if (!this.#history) return;
    for (const chart of this.#charts) {
      chart.forget();
      if (isForAll || chart.isSeen) chart.draw(this.#history);
    }
  }
}

/** A lane that nobody used needs no line; those that are left keep their colours. */
function lanesOf(figure) {
  const all = LANES.map((lane, index) => ({
    name: lane,
    column: `lanes.${lane}.${figure}`,
    colour: index + 1,
  }));
  return (history) => {
    const isUsed = ({ name, column }) =>
      name === "default" || history.column(column).some((value) => value > 0);
    return all.filter(isUsed);
  };
}

/** All together, and the codes with the most; by name, so that lines keep their colours. */
function errorLines(history) {
  const codes = history.codes.slice(0, NUM_COLOURS - 1).sort();
  const ofCodes = codes.map((code, index) => ({
    name: code,
    column: `errors.${code}`,
    colour: index + 2,
  }));
  return [{ name: "failed", column: "requests.failed", colour: 1 }, ...ofCodes];
}

class Chart {
  isSeen = false;
  width = 0;
  #kind;
  #legend;
  #plot = null;
  /** Times, and a column for each line. */
  #data = [[]];
  #drawnAt = 0;
  #lines = [];
  #values = [];

  constructor(kind, place) {
    this.#kind = kind;
    this.card = place.appendChild(document.createElement("figure"));
    this.card.className = "chart";
    const caption = this.card.appendChild(document.createElement("figcaption"));
    caption.append(kind.title);
    this.#legend = this.card.appendChild(document.createElement("ul"));
    this.#legend.setAttribute("role", "list");
    this.canvas = this.card.appendChild(document.createElement("div"));
    this.canvas.className = "chart-canvas";
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", kind.title);
  }

  draw(history) {
    if (!this.width) return;
    const lines = this.#kind.lines(history);
    const isSame =
      lines.length === this.#lines.length &&
      lines.every(({ name }, at) => name === this.#lines[at].name);
    if (!isSame) this.forget();
    this.#lines = lines;
    this.#data = [history.times, ...lines.map(({ column }) => history.column(column))];
    if (!this.#plot) this.#begin();
    else if (this.#plot.width !== this.width) this.#plot.setSize({ width: this.width, height: HEIGHT });
    const [first, last] = [history.times[0], history.times.at(-1)];
    // Before the line has moved by a pixel there is nothing new to be seen.
    if (last - this.#drawnAt >= (last - first) / this.width || last < this.#drawnAt) {
      this.#drawnAt = last;
      this.#plot.setData(this.#data);
    }
    this.#showValues(this.#plot.cursor.idx);
  }

  /** The next drawing begins anew: its lines or its colours are others. */
  forget() {
    this.#plot?.destroy();
    this.#plot = null;
  }

  #begin() {
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    const axis = {
      stroke: colour("--muted"),
      font: `11px ${colour("--sans")}`,
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
    };
    const { write, least = 0 } = this.#kind;
    const options = {
      width: this.width,
      height: HEIGHT,
      legend: { show: false },
      padding: [8, 8, 0, 0],
      scales: {
        x: { time: true, range: spanOf },
        y: { range: (_, low, high) => [0, roomAbove(high, least)] },
      },
      axes: [
        {
          ...axis,
          size: 24,
          space: 64,
          grid: { show: false },
          values: (_, ticks) => ticks.map((at) => clock(at).slice(0, 5)),
          incrs: [60, 120, 300],
        },
        {
          ...axis,
          size: 52,
          space: 28,
          values: (_, ticks) => ticks.map(write),
        },
      ],
      series: [
        {},
        ...this.#lines.map(({ name, colour: number }) => ({
          label: name,
          stroke: colour(`--series-${number}`),
          fill: this.#lines.length === 1 ? colour("--series-fill") : undefined,
          width: LINE_WIDTH,
          points: { show: false },
        })),
      ],
      cursor: {
        y: false,
        drag: { x: false, y: false },
        sync: { key: CURSOR },
        points: { size: 6 },
      },
      hooks: { setCursor: [(plot) => this.#showValues(plot.cursor.idx)] },
    };
    this.#plot = new uPlot(options, this.#data, this.canvas);
    this.#drawnAt = 0;
    this.#fillLegend();
  }

  #fillLegend() {
    this.#values = this.#lines.map(({ name, colour }) => {
      const item = document.createElement("li");
      const key = item.appendChild(document.createElement("span"));
      key.className = `key key-${colour}`;
      if (this.#lines.length > 1) item.append(`${name} `);
      return item.appendChild(document.createElement("strong"));
    });
    this.#legend.replaceChildren(...this.#values.map((value) => value.parentElement));
  }

  /** What the lines are at the cursor, or now. */
  #showValues(index) {
    if (!this.#plot) return;
    const at = index ?? this.#data[0].length - 1;
    const told = this.#values.map((node, line) => {
      const value = this.#data[line + 1][at];
      const text = value === null || value === undefined ? NOTHING : this.#kind.write(value);
      if (node.textContent !== text) node.textContent = text;
      return `${this.#lines[line].name} ${text}`;
    });
    const label = `${this.#kind.title}: ${told.join(", ")}`;
    if (this.canvas.ariaLabel !== label) this.canvas.ariaLabel = label;
  }
}

function spanOf(_, low, high) {
  return [Math.min(low ?? 0, (high ?? 0) - MIN_SPAN_S), high ?? 0];
}

/** An axis that ends a little above its line, and is never a point. */
function roomAbove(high, least) {
  return Math.max((high ?? 0) * 1.15, least) || 1;
}
