// One turn of the conversation on the page: a question, or an answer with all that is said under it.

import { renderText } from "./text.js";
import { describeEnd, describeFailure, describePlace, describeStats } from "./wording.js";

/** A wait shorter than this is not worth a number. */
const SHOW_WAIT_AFTER_S = 2;

const LINES = {
  connecting: "Sending…",
  waiting: "Waiting in the queue…",
  resuming: "Resuming…",
  reconnecting: "Connection lost, resuming…",
  stopping: "Stopping…",
};

/** @returns {HTMLElement} */
export function newQuestion(turn) {
  const item = copyOf("question-template");
  item.querySelector(".text").textContent = turn.text;
  return item;
}

/** The view of an answer: it shows what stands in `turn`, and what is going on with it. */
export class AnswerView {
  /**
   * @param {object} turn
   * @param {{onRetry: () => void, onGrowth: () => void, announce: (text: string) => void}} page
   */
  constructor(turn, page) {
    this.item = copyOf("answer-template");
    this.#turn = turn;
    this.#page = page;
    this.#announced = turn.progress?.text.length ?? 0; // what is old needs no reading out
    this.#part("problem").lastElementChild.addEventListener("click", page.onRetry);
    this.showEnd();
  }

  #turn;
  #page;
  #announced;
  #frame = 0;
  #clock = 0;

  /** Shows new text, at most once per frame, however fast tokens come. */
  showTextSoon() {
    this.#frame ||= requestAnimationFrame(() => this.#showText());
  }

  /** @param {import("./headrace.js").State|"resuming"|"stopping"} state */
  showState(state) {
    const isWaiting = state === "waiting";
    this.item.dataset.state = state;
    this.item.setAttribute("aria-busy", "true");
    for (const part of ["note", "problem", "stats"]) this.#part(part).hidden = true;
    const line = state === "reconnecting" && !navigator.onLine ? "You are offline…" : LINES[state];
    this.#showLine(line ?? "");
    if (line && state !== "connecting") this.#page.announce(line);
    if (isWaiting) this.#countWaiting(line);
  }

  /** @param {import("./headrace.js").Place} place */
  showPlace(place) {
    const line = describePlace(place);
    if (line && this.item.dataset.state === "waiting") this.#showLine(line);
  }

  /** Shows how the answer ended; nothing but its text while it is open. */
  showEnd() {
    const { progress, failure, isOpen } = this.#turn;
    delete this.item.dataset.state;
    this.item.removeAttribute("aria-busy");
    this.#showText();
    this.#announceRest();
    this.#showLine("");
    this.#fill("note", isOpen ? "" : describeEnd(this.#turn));
    this.#showFailure(isOpen ? null : failure);
    this.#showStats(isOpen ? null : progress?.stats);
    this.#page.onGrowth();
  }

  #part(name) {
    return this.item.querySelector(`:scope > .${name}`);
  }

  #fill(name, text) {
    this.#part(name).textContent = text;
    this.#part(name).hidden = !text;
  }

  #showText() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    renderText(this.#part("text"), this.#turn.progress?.text ?? "");
    this.#announceSentences();
    this.#page.onGrowth();
  }

  #showLine(text) {
    clearInterval(this.#clock);
    this.#fill("activity", text);
    this.#page.onGrowth();
  }

  #countWaiting(line) {
    const since = performance.now();
    this.#clock = setInterval(() => {
      const seconds = Math.floor((performance.now() - since) / 1000);
      if (seconds >= SHOW_WAIT_AFTER_S) this.#fill("activity", `${line} ${seconds} s`);
    }, 1000);
  }

  /** Reads out whole sentences: single tokens would be noise. */
  #announceSentences() {
    const text = this.#turn.progress?.text ?? "";
    const unread = text.slice(this.#announced);
    const end = /^[\s\S]*(?:[.!?…:]["')\]]?\s|\n)/.exec(unread)?.[0].length ?? 0;
    this.#announce(end);
  }

  #announceRest() {
    this.#announce(Infinity);
  }

  #announce(length) {
    const text = this.#turn.progress?.text ?? "";
    const sentence = text.slice(this.#announced, this.#announced + length);
    this.#announced += sentence.length;
    if (sentence.trim()) this.#page.announce(sentence.trim());
  }

  #showFailure(failure) {
    const box = this.#part("problem");
    box.hidden = !failure;
    if (!failure) return;
    const [sentence, code, button] = box.children;
    sentence.textContent = describeFailure(failure);
    code.textContent = failure.code;
    button.textContent = failure.canResume ? "Resume" : "Try again";
    this.#page.announce(sentence.textContent);
  }

  #showStats(stats) {
    const list = this.#part("stats");
    list.hidden = !stats;
    list.replaceChildren(...(stats ? describeStats(stats).map(newFigure) : []));
  }
}

function newFigure({ name, value, kind }) {
  const group = document.createElement("div");
  group.className = kind;
  group.append(document.createElement("dt"), document.createElement("dd"));
  group.firstChild.textContent = name;
  group.lastChild.textContent = value;
  return group;
}

function copyOf(template) {
  return document.getElementById(template).content.firstElementChild.cloneNode(true);
}
