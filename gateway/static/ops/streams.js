// The streams that are open now. The list is asked for only while it is on the screen.

import { call } from "./calls.js";
import { Sheet } from "./sheet.js";
import { age, NOTHING, number } from "./words.js";

const LIST_EVERY_MS = 3000;

export class Streams {
  #sheet;
  #isSeen = false;
  #isAsking = false;
  #listedAt = -Infinity;

  /** @param {HTMLElement} place */
  constructor(place) {
    this.#sheet = new Sheet(place, {
      label: "Live streams",
      empty: "Nobody is reading.",
      key: ({ id }) => id,
      columns: [
        { name: "Request", kind: "name", text: ({ id }) => id },
        { name: "Lane", text: ({ lane }) => lane },
        { name: "Worker", kind: "code", text: ({ worker }) => worker || NOTHING },
        { name: "Tokens", kind: "figure", text: ({ tokens }) => number(tokens) },
        { name: "Open for", kind: "figure", text: ({ age_s: since }) => age(since) },
      ],
    });
    new IntersectionObserver(([{ isIntersecting }]) => {
      this.#isSeen = isIntersecting;
      if (isIntersecting) this.#list();
    }).observe(place);
  }

  /** Looks again once it is time to. */
  show() {
    if (this.#isSeen && performance.now() - this.#listedAt > LIST_EVERY_MS) this.#list();
  }

  async #list() {
    if (this.#isAsking) return;
    this.#isAsking = true;
    try {
      this.#sheet.show((await call("GET", "/ops/streams")).data);
    } catch {
      // the feed's own state says what is wrong, and the next second tries again
    } finally {
      this.#listedAt = performance.now();
      this.#isAsking = false;
    }
  }
}
