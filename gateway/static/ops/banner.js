// The banner: what is so, why, and the one command to run, in words for who knows nothing of queues.

import { $, announce } from "../page.js";
import { connectCopy, newCommand, paragraph } from "./dialogs.js";

const SIGNS = {
  ok: "M5 12.5l4.5 4.5L19 7.5",
  warning: "M12 5v9M12 18.4v.2",
  critical: "M12 5v9M12 18.4v.2",
  unknown: "M6 12h.2M12 12h.2M18 12h.2",
};
const TITLES = { warning: "Warning", critical: "Critical" };
/** By code of the diagnosis: the stations of the picture that it is about. */
const STATIONS = {
  redis_away: ["queue", "stream"],
  no_worker: ["workers"],
  redis_evicts: ["stream"],
  redis_memory: ["stream"],
  durability: ["stream"],
  errors: ["router"],
  queue_grows: ["queue"],
  worker_lost: ["workers"],
  gateway_lost: ["router"],
  slow_worker: ["workers"],
  dead_letters: ["queue"],
};

export class Banner {
  /** By station of the picture: how badly it is off. @type {Map<string, string>} */
  severities = new Map();
  #code = "";
  #severity = "unknown";
  /** By code: the lines below the first one. */
  #more = new Map();

  constructor() {
    connectCopy($("banner-command").querySelector("button"), $("banner-command").querySelector("code"));
  }

  /** @param {{severity: string, what: string, why: string, command: string, code: string}[]} diagnosis */
  show(diagnosis) {
    if (!diagnosis.length) return;
    const [{ severity, what, why, command, code }, ...more] = diagnosis;
    $("banner").dataset.severity = severity;
    setText($("banner-what"), what);
    setText($("banner-why"), why);
    $("banner-command").hidden = !command;
    setText($("banner-command").querySelector("code"), command);
    if (code !== this.#code || severity !== this.#severity) this.#turnTo(code, severity, what);
    this.#showMore(more);
    // The worst comes first, and what was set stays.
    this.severities = new Map(
      diagnosis
        .toReversed()
        .flatMap((one) => (STATIONS[one.code] ?? []).map((station) => [station, one.severity])),
    );
  }

  /** Its figures change each second; who listens is told when it is another case, or a worse one. */
  #turnTo(code, severity, what) {
    const isNews = code !== this.#code || severity === "critical";
    if (isNews && (this.#code || severity !== "ok")) announce(what);
    this.#code = code;
    this.#severity = severity;
    $("banner")
      .querySelector(".banner-sign path")
      .setAttribute("d", SIGNS[severity] ?? SIGNS.unknown);
    document.title = `${TITLES[severity] ?? "Operations"} – Headrace`;
  }

  #showMore(more) {
    const list = $("banner-more");
    list.hidden = !more.length;
    const before = this.#more;
    this.#more = new Map(more.map(({ code }) => [code, before.get(code) ?? newLine()]));
    for (const [code, { item }] of before) if (!this.#more.has(code)) item.remove();
    more.forEach(({ severity, what, why, command, code }, index) => {
      const { item, parts } = this.#more.get(code);
      item.dataset.severity = severity;
      [what, why, command].forEach((text, part) => setText(parts[part], text));
      parts[2].parentElement.hidden = !command;
      if (list.children[index] !== item) list.insertBefore(item, list.children[index] ?? null);
    });
  }
}

function newLine() {
  const item = document.createElement("li");
  const command = newCommand("");
  item.append(paragraph("", "what"), paragraph("", "why"), command);
  return { item, parts: [item.children[0], item.children[1], command.firstElementChild] };
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
