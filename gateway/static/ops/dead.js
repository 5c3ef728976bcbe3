// What was set aside because workers died of it: looked at, asked again, or discarded.

import { announce, call } from "../page.js";
import { ask, newCommand, newFacts, showDetails } from "./dialogs.js";
import { showProblem } from "./problem.js";
import { Sheet } from "./sheet.js";
import { age, date, NOTHING, number } from "./words.js";

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
        { name: "Lane", text: ({ lane }) => lane },
        { name: "Last worker", kind: "code", text: ({ worker }) => worker || NOTHING },
        { name: "Workers lost", kind: "figure", text: ({ deaths }) => number(deaths) },
        { name: "Tokens shown", kind: "figure", text: ({ tokens }) => number(tokens) },
        {
          name: "",
          buttons: [
            { text: () => "Inspect", label: ({ id }) => `Inspect ${id}`, act: inspect },
            {
              text: () => "Requeue",
              label: ({ id }) => `Requeue ${id}`,
              act: (letter) => this.#requeue(letter),
            },
            {
              text: () => "Discard",
              label: ({ id }) => `Discard ${id}`,
              act: (letter) => this.#discard(letter),
            },
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
      this.#sheet.show(this.#count ? (await call("GET", "/ops/dead")).dead : []);
    } catch (error) {
      showProblem(error);
    }
  }

  async #requeue({ id }) {
    const told = "It is asked anew, under a new id. Should workers die of it again, it comes back here.";
    if (!(await ask("Requeue this request?", told, "Requeue"))) return;
    await this.#act(
      id,
      "requeue",
      ({ request_id: again }) => `Request ${id} is asked anew as ${again}.`,
    );
  }

  async #discard({ id }) {
    const told = "It goes for good, with the prompt that it would take to ask it anew.";
    if (!(await ask("Discard this request?", told, "Discard"))) return;
    await this.#act(id, "discard", () => `Request ${id} is discarded.`);
  }

  async #act(id, deed, said) {
    showProblem(null);
    try {
      announce(said(await call("POST", `/ops/dead/${encodeURIComponent(id)}/${deed}`)));
    } catch (error) {
      showProblem(error);
    }
    await this.#list();
  }
}

function inspect({ id }) {
  return showDetails(id, async () => {
    const evidence = await call("GET", `/ops/dead/${encodeURIComponent(id)}`);
    return [newCommand(`headrace incident show ${requestOf(id)}`), newFacts(factsOf(evidence))];
  });
}

/** How it was asked and what became of it; what was asked, nobody shows. */
function factsOf({ letter, parameters, ...evidence }) {
  return {
    "Set aside": date(letter.at),
    "Asked at": evidence.asked_at && date(evidence.asked_at),
    "By the tenant": letter.tenant,
    "Over the API": evidence.api,
    "In the lane": letter.lane,
    "Model version": letter.model_version,
    "Workers that died": evidence.workers.join(", "),
    "Prompt, in tokens": number(evidence.prompt_tokens),
    "Tokens shown": number(letter.tokens),
    Waited: age(evidence.waited),
    "First token after": age(evidence.first_token),
    Lasted: age(evidence.lasted),
    "Can be asked anew": evidence.is_kept ? "yes" : "no, its prompt is no longer kept",
    "Asked anew as": evidence.requeued_as,
    ...parameters,
  };
}

/** A choice of a request is named `<request>.<choice>`. */
function requestOf(id) {
  return id.slice(0, id.lastIndexOf("."));
}
