// Errors by code, and the last requests that ended with one: the way into an incident.

import { call } from "../page.js";
import { newCommand, paragraph, showDetails } from "./dialogs.js";
import { Sheet } from "./sheet.js";
import { date, number } from "./words.js";

export class Errors {
  /** @param {HTMLElement} place */
  constructor(place) {
    this.#sheet = new Sheet(place, {
      label: "Errors by code",
      empty: "None.",
      key: ({ code }) => code,
      columns: [
        { name: "Code", kind: "name", text: ({ code }) => code },
        { name: "Last minute", kind: "figure", text: ({ count_1m: count }) => number(count) },
        { name: "In all", kind: "figure", text: ({ total }) => number(total) },
        {
          name: "",
          buttons: [
            { text: () => "Show", label: ({ code }) => `Show requests with ${code}`, act: showIncident },
          ],
        },
      ],
    });
  }

  #sheet;

  show(errors) {
    this.#sheet.show(errors);
  }
}

function showIncident({ code }) {
  return showDetails(code, async () => {
    const { meaning, explain, failures, commands } = await call(
      "GET",
      `/ops/errors/${encodeURIComponent(code)}`,
    );
    const none = paragraph("No request is remembered that ended with it.", "hint");
    const shown = failures.map((failure, index) => newFailure(failure, commands[index]));
    return [paragraph(meaning), newCommand(explain), ...(shown.length ? shown : [none])];
  });
}

/** One request: when and where it failed, and the command that tells its story. */
function newFailure({ at, worker }, command) {
  const box = document.createElement("section");
  box.className = "failure";
  box.append(
    paragraph(`${date(at)}${worker ? ` · worker ${worker}` : ""}`, "hint"),
    newCommand(command),
  );
  return box;
}
