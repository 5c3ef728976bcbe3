// What was set aside because workers died of it: looked at, asked again, or discarded.

import { announce } from "../page.js";
import { call, showProblem } from "./calls.js";
import { ask, newCommand, newFacts, paragraph, showDetails } from "./dialogs.js";
import { Sheet } from "./sheet.js";
import { date, number } from "./words.js";

const LIST_EVERY_MS = 15_000;

export class DeadLetters {
  #sheet;
  /** How many there were when the list was asked for. */
  #count = -1;
  #listedAt = -Infinity;

  /** @param {HTMLElement} place */
  constructor(place) {
    this.#sheet = new Sheet(place, {
      label: "Requests that were set aside",
      empty: "Nothing was set aside.",
      key: ({ id }) => id,
      columns: [
        { name: "Request", kind: "name", text: ({ id }) => id },
        { name: "Since", kind: "figure", text: ({ at }) => date(at) },
        { name: "Code", kind: "code", text: ({ code }) => code },
        { name: "Workers lost", kind: "figure", text: ({ deaths }) => number(deaths) },
        {
          name: "",
          buttons: [
            { text: () => "Inspect", label: ({ id }) => `Inspect ${id}`, act: inspect },
            { text: () => "Requeue", label: ({ id }) => `Requeue ${id}`, act: (letter) => this.#requeue(letter) },
            { text: () => "Discard", label: ({ id }) => `Discard ${id}`, act: (letter) => this.#discard(letter) },
          ],
        },
      ],
    });
  }

  /** @param {number} count  Of the overview: when it has changed, the list has. */
  show(count) {
    const isDue = performance.now() - this.#listedAt > LIST_EVERY_MS;
    if (count === this.#count && (!count || !isDue)) return;
    this.#count = count;
    this.#list();
  }

  async #list() {
    this.#listedAt = performance.now();
    try {
      this.#sheet.show(this.#count ? (await call("GET", "/ops/dead")).data : []);
    } catch (error) {
      showProblem(error);
    }
  }

  async #requeue({ id }) {
    const told = "A worker takes it up again. If that one dies of it as well, it comes back here.";
    if (await ask("Requeue this request?", told, "Requeue")) await this.#act(id, "requeue", "is queued again");
  }

  async #discard({ id }) {
    const told = "It can not be asked again from here.";
    if (await ask("Discard this request?", told, "Discard")) await this.#act(id, "discard", "is discarded");
  }

  async #act(id, deed, done) {
    showProblem(null);
    try {
      await call("POST", `/ops/dead/${encodeURIComponent(id)}/${deed}`);
      announce(`Request ${id} ${done}.`);
    } catch (error) {
      showProblem(error);
    }
    await this.#list();
  }
}

function inspect({ id }) {
  return showDetails(id, async () => {
    const { command, ...facts } = await call("GET", `/ops/dead/${encodeURIComponent(id)}`);
    return [newCommand(command ?? `headrace incident show ${id}`), newFacts(facts)];
  });
}
