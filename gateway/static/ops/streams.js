// The streams that are open now. The list is asked for only while it is on the screen.

import { call } from "../page.js";
import { Sheet } from "./sheet.js";
import { age, number } from "./words.js";

const LIST_EVERY_MS = 3000;

export class Streams {
  #sheet;
  /** How many of all are shown. */
  #hint;
  #isSeen = false;
  #isAsking = false;
  #count = 0;
  #listedAt = -Infinity;

  /** @param {HTMLElement} place */
  constructor(place) {
    this.#hint = place.appendChild(document.createElement("p"));
    this.#hint.className = "hint";
    this.#sheet = new Sheet(place, {
      label: "Live streams",
      empty: "Nobody is reading.",
      key: ({ id }) => id,
      columns: [
        { name: "Request", kind: "name", text: ({ id }) => id },
        { name: "Lane", text: ({ lane }) => lane },
        { name: "Worker", kind: "code", text: ({ worker }) => worker || "waiting" },
        { name: "Prompt", kind: "figure", text: ({ prompt_tokens: tokens }) => number(tokens) },
        { name: "Tokens", kind: "figure", text: ({ tokens }) => number(tokens) },
        { name: "Since", kind: "figure", text: ({ age_ms: since }) => age(since / 1000) },
      ],
    });
    new IntersectionObserver(([{ isIntersecting }]) => {
      this.#isSeen = isIntersecting;
      if (isIntersecting) this.#list();
    }).observe(place);
  }

  /** Looks again once it is time to. @param {number} count  Of all that are open. */
  show(count) {
    this.#count = count;
    if (this.#isSeen && performance.now() - this.#listedAt > LIST_EVERY_MS) this.#list();
  }

  async #list() {
    if (this.#isAsking) return;
    this.#isAsking = true;
    try {
      const { streams } = await call("GET", "/ops/streams");
      this.#sheet.show(streams);
      this.#hint.textContent =
        streams.length < this.#count ? `${number(streams.length)} of ${number(this.#count)}` : "";
    } catch {
      // the feed's own state says what is wrong, and the next second tries again
    } finally {
      this.#listedAt = performance.now();
      this.#isAsking = false;
    }
  }
}
