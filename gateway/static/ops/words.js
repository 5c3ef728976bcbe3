// How the operations page writes figures and states.

import { number, seconds as longer } from "../wording.js";

export { number };

export const NOTHING = "–";

/** A rate or an amount: few digits, so that it can be read while it moves. */
export function figure(value) {
  if (value === null || value === undefined) return NOTHING;
  return value !== 0 && Math.abs(value) < 99.95
    ? String(Number(value.toFixed(1)))
    : number(Math.round(value));
}

/** A measured time, down to tenths of a millisecond. */
export function seconds(value) {
  return value > 0 && value < 0.00095 ? `${(value * 1000).toFixed(1)} ms` : longer(value);
}

export function percent(ratio) {
  if (ratio === null || ratio === undefined) return NOTHING;
  const value = ratio * 100;
  return `${value > 0 && value < 9.95 ? Number(value.toFixed(1)) : Math.round(value)} %`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NOTHING;
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (value >= 1024 && power < units.length - 1) {
    value /= 1024;
    power++;
  }
  return `${value < 9.95 && power ? value.toFixed(1) : Math.round(value)} ${units[power]}`;
}

/** How long something lasts or has lasted. */
export function age(seconds) {
  if (seconds === null || seconds === undefined) return NOTHING;
  if (seconds < 9.95) return `${Number(seconds.toFixed(1))} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86_400)} days`;
}

const CLOCK = new Intl.DateTimeFormat("en-GB", { timeStyle: "medium" });
const DATE = new Intl.DateTimeFormat("en-GB", { dateStyle: "medium", timeStyle: "medium" });

/** @param {number} at  Seconds since 1970. */
export function clock(at) {
  return CLOCK.format(at * 1000);
}

/** The day as well, for what may lie days back. */
export function date(at) {
  return DATE.format(at * 1000);
}

/** `one` or `many` of something, with the number before it. */
export function count(value, one, many) {
  return `${number(value)} ${value === 1 ? one : many}`;
}
