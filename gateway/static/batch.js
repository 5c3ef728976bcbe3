// One batch on the page: its name, how far it is, and what can be done with it.

import { describeBatch, describeBatchEnd, describeBatchState } from "./wording.js";

/** The rate is that of the last so many milliseconds. */
const RATE_OVER_MS = 15_000;
const MAX_ERRORS = 10;
const STOPPABLE = ["validating", "in_progress"];
export const ENDED = ["completed", "failed", "expired", "cancelled"];

export class BatchView {
  /**
   * @param {object} batch
   * @param {{announce: (text: string) => void, cancel: (view: BatchView) => void, download: (event:
   *   Event) => void}} page
   */
  constructor(batch, page) {
    const template = document.getElementById("batch-template");
    this.item = template.content.firstElementChild.cloneNode(true);
    this.id = batch.id;
    this.name = batch.metadata?.name || batch.id;
    this.#page = page;
    this.#part("h3").textContent = this.name;
    this.#part("h3").title = batch.id;
    this.#part("progress").setAttribute("aria-label", `Finished lines of ${this.name}`);
    this.#part("button").setAttribute("aria-label", `Cancel ${this.name}`);
    this.#part("button").addEventListener("click", () => page.cancel(this));
    for (const link of this.item.querySelectorAll("a")) link.addEventListener("click", page.download);
  }

  #page;
  #batch = null;
  /** When how many lines were finished: [milliseconds, lines]. */
  #seen = [];

  show(batch) {
    const before = this.#batch;
    this.#batch = batch;
    this.item.dataset.status = batch.status;
    this.#part(".batch-state").textContent = describeBatchState(batch.status);
    this.#part(".batch-figures").textContent = describeBatch(batch, this.#rate());
    this.#showProgress();
    this.#showErrors();
    this.#showActions();
    if (before && before.status !== batch.status && ENDED.includes(batch.status)) {
      this.#page.announce(`${this.name}: ${describeBatchEnd(batch)}`);
    }
  }

  /** @param {import("./headrace.js").State} state */
  showConnection(state) {
    const isLost = state === "reconnecting";
    this.item.classList.toggle("lost", isLost);
    const shown = describeBatchState(this.#batch.status);
    this.#part(".batch-state").textContent = isLost ? `${shown} – connection lost, trying again…` : shown;
  }

  #part(selector) {
    return this.item.querySelector(selector);
  }

  /** Lines per second; 0 while nothing is known. */
  #rate() {
    const { completed, failed } = this.#batch.request_counts;
    const now = performance.now();
    this.#seen.push([now, completed + failed]);
    while (this.#seen.length > 2 && this.#seen[0][0] < now - RATE_OVER_MS) this.#seen.shift();
    const [since, lines] = this.#seen[0];
    return now > since ? ((completed + failed - lines) / (now - since)) * 1000 : 0;
  }

  #showProgress() {
    const { total, completed, failed } = this.#batch.request_counts;
    const bar = this.#part("progress");
    bar.hidden = ENDED.includes(this.#batch.status);
    bar.max = total || 1;
    if (total) bar.value = completed + failed;
    else bar.removeAttribute("value"); // its lines are being counted
  }

  #showErrors() {
    const errors = (this.#batch.errors?.data ?? []).slice(0, MAX_ERRORS);
    const list = this.#part(".batch-errors");
    list.hidden = errors.length === 0;
    list.replaceChildren(
      ...errors.map(({ line, message }) => {
        const item = document.createElement("li");
        item.textContent = line ? `Line ${line}: ${message}` : message;
        return item;
      }),
    );
  }

  #showActions() {
    const { status, output_file_id: output, error_file_id: errors } = this.#batch;
    const button = this.#part("button");
    const hadFocus = document.activeElement === button;
    button.hidden = !STOPPABLE.includes(status);
    const stem = this.name.replace(/\.jsonl?$/, "");
    for (const [kind, file, suffix] of [
      ["output", output, "output"],
      ["error", errors, "errors"],
    ]) {
      const link = this.#part(`a[data-kind="${kind}"]`);
      link.hidden = !file;
      if (!file) continue;
      link.href = new URL(`../v1/files/${encodeURIComponent(file)}/content`, import.meta.url).href;
      link.download = `${stem}.${suffix}.jsonl`;
      link.setAttribute("aria-label", `${link.textContent} of ${this.name}`);
    }
    // A button that disappears must not take the keyboard's place with it.
    if (hadFocus && button.hidden) document.getElementById("batches-title").focus();
  }
}
