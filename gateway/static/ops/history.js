// The minutes that the charts show, as columns of numbers by name; the oldest seconds are dropped.
//
// The gateway sends the columns of the minutes before; each overview adds a second to them. Errors by
// code are known since the page was opened.

/** As long as the gateway keeps them. */
const KEPT_S = 15 * 60;
/** Between two seconds further apart than this nothing is known, and no line is drawn. */
const GAP_S = 5;

/** What the charts show, under the gateway's names: how it follows from an overview. */
const FIGURES = {
  "requests.per_s": ({ requests }) => requests.per_s,
  "requests.failed": ({ requests }) => requests.failed,
  "stats.tokens_per_second": ({ stats }) => stats.tokens_per_second,
  "latency.ttft.p50": ({ latency }) => latency.ttft.p50,
  "latency.ttft.p99": ({ latency }) => latency.ttft.p99,
  "latency.inter_token.p50": ({ latency }) => latency.inter_token.p50,
  "latency.inter_token.p99": ({ latency }) => latency.inter_token.p99,
};
export const LANES = ["priority", "default", "flex", "batch"];
const LANE_FIGURES = ["depth", "oldest_age_s"];
const ERRORS = "errors.";

export class History {
  /** @type {number[]} In seconds since 1970. */
  times = [];
  /** @type {Map<string, (number|null)[]>} Each as long as `times`. */
  #columns = new Map();

  constructor() {
    for (const name of Object.keys(FIGURES)) this.#columns.set(name, []);
    for (const lane of LANES)
      for (const figure of LANE_FIGURES) this.#columns.set(`lanes.${lane}.${figure}`, []);
  }

  /** The gateway's columns take the place of what is here; errors by code are kept. */
  replace({ at, ...told }) {
    const [times, columns] = [this.times, this.#columns];
    const places = new Map(times.map((time, index) => [time, index]));
    const kept = [...columns.keys()].filter((name) => name.startsWith(ERRORS));
    this.times = [];
    this.#columns = new Map([...columns.keys()].map((name) => [name, []]));
    at.forEach((time, index) => {
      const values = new Map([...columns.keys()].map((name) => [name, told[name]?.[index] ?? null]));
      for (const name of kept) values.set(name, columns.get(name)[places.get(time)] ?? null);
      this.#take(time, values, null);
    });
  }

  /** Takes an overview; what is not older than it was measured by a clock that was set back since. */
  add(overview) {
    const at = Math.round(overview.at * 1000) / 1000; // as exact as the gateway's columns
    while (this.times.at(-1) >= at) for (const column of this.#all) column.pop();
    this.#take(at, valuesOf(overview), 0);
    const dropped = this.times.findIndex((time) => time >= at - KEPT_S);
    if (dropped > 0) for (const column of this.#all) column.splice(0, dropped);
  }

  /** @returns {(number|null)[]} */
  column(name) {
    return this.#columns.get(name) ?? [];
  }

  /** The codes of the failures that are in the minutes, by how many there were. */
  get codes() {
    const sums = [...this.#columns.keys()]
      .filter((name) => name.startsWith(ERRORS))
      .map((name) => [
        name.slice(ERRORS.length),
        this.column(name).reduce((sum, count) => sum + count, 0),
      ]);
    return sums
      .filter(([, sum]) => sum > 0)
      .sort(([, a], [, b]) => b - a)
      .map(([code]) => code);
  }

  get #all() {
    return [this.times, ...this.#columns.values()];
  }

  /** `noErrors`: what a code has of which nothing is said. */
  #take(time, values, noErrors) {
    const last = this.times.at(-1) ?? time;
    if (time - last > GAP_S) this.#append(last + 1, new Map(), null);
    this.#append(time, values, noErrors);
  }

  #append(time, values, noErrors) {
    for (const name of values.keys()) {
      if (!this.#columns.has(name))
        this.#columns.set(
          name,
          this.times.map(() => null),
        );
    }
    this.times.push(time);
    for (const [name, column] of this.#columns) {
      column.push(values.get(name) ?? (name.startsWith(ERRORS) ? noErrors : null));
    }
  }
}

function valuesOf(overview) {
  const values = new Map(Object.entries(FIGURES).map(([name, of]) => [name, of(overview)]));
  for (const { lane, ...figures } of overview.lanes) {
    for (const figure of LANE_FIGURES) values.set(`lanes.${lane}.${figure}`, figures[figure]);
  }
  for (const { code, count_1m: count } of overview.errors) values.set(ERRORS + code, count);
  return values;
}
