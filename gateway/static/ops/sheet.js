// A table whose rows are found by a key and changed in place, so that a thousand figures a second cost
// little, and what somebody points at, selects or has the focus on stays where it is.

/**
 * @template R
 * @typedef {object} Column
 * @property {string} name  Its heading; "" for a column of buttons.
 * @property {(row: R) => string} [text]
 * @property {(row: R) => number|null|undefined} [level]  Between 0 and 1: drawn as a bar.
 * @property {(row: R) => string} [hint]  Shown where the text may be cut off.
 * @property {"figure"|"code"|"state"|"name"} [kind]
 * @property {{text: (row: R) => string, label: (row: R) => string, isShown?: (row: R) => boolean, act: (row: R) => void}[]}
 *   [buttons]
 */

/** @template R */
export class Sheet {
  /**
   * @param {HTMLElement} place
   * @param {{label: string, key: (row: R) => string, columns: Column<R>[], empty: string, state?: (row: R) => string}}
   *   options  `empty` is said where there are no rows.
   */
  constructor(place, options) {
    this.#options = options;
    this.#empty = place.appendChild(document.createElement("p"));
    this.#empty.className = "hint";
    this.#empty.textContent = options.empty;
    this.#empty.hidden = true;
    this.#table = place.appendChild(document.createElement("table"));
    this.#table.setAttribute("aria-label", options.label);
    this.#table.setAttribute("role", "table");
    const head = this.#table.createTHead().insertRow();
    for (const { name, kind } of options.columns) {
      const cell = head.appendChild(document.createElement("th"));
      cell.scope = "col";
      cell.textContent = name;
      if (kind) cell.dataset.kind = kind;
      if (!name) {
        cell.dataset.kind = "buttons";
        cell.append(newHiddenName("Actions"));
      }
    }
    this.#body = this.#table.createTBody();
    this.#table.hidden = true;
  }

  #options;
  #empty;
  #table;
  #body;
  /** @type {Map<string, Line<R>>} */
  #lines = new Map();

  /** @param {R[]} rows */
  show(rows) {
    const before = this.#lines;
    this.#lines = new Map();
    for (const row of rows) {
      const key = this.#options.key(row);
      const line = before.get(key) ?? new Line(this.#options);
      this.#lines.set(key, line);
      line.show(row);
    }
    for (const [key, line] of before) if (!this.#lines.has(key)) this.#remove(line);
    let at = this.#body.firstElementChild;
    for (const { element } of this.#lines.values()) {
      if (element === at) at = at.nextElementSibling;
      else this.#body.insertBefore(element, at);
    }
    if (this.#table.hidden === rows.length > 0) this.#table.hidden = rows.length === 0;
    if (this.#empty.hidden !== rows.length > 0) this.#empty.hidden = rows.length > 0;
  }

  /** A row that goes must not take the keyboard's place with it. */
  #remove(line) {
    const hadFocus = line.element.contains(document.activeElement);
    const section = this.#table.closest("section");
    line.element.remove();
    if (hadFocus) section?.querySelector("h2[tabindex]")?.focus();
  }
}

/** @template R */
class Line {
  #options;
  #cells;
  #row = null;

  constructor(options) {
    this.#options = options;
    this.element = document.createElement("tr");
    this.element.setAttribute("role", "row");
    this.#cells = options.columns.map((column) => this.#newCell(column));
  }

  show(row) {
    this.#row = row;
    const state = this.#options.state?.(row);
    if (state !== undefined && this.element.dataset.state !== state) this.element.dataset.state = state;
    for (const cell of this.#cells) cell(row);
  }

  /** Returns what writes a row into the cell. */
  #newCell({ name, text, level, hint, kind, buttons }) {
    const isHead = kind === "name";
    const cell = this.element.appendChild(document.createElement(isHead ? "th" : "td"));
    cell.setAttribute("role", isHead ? "rowheader" : "cell");
    if (isHead) cell.scope = "row";
    if (kind) cell.dataset.kind = kind;
    cell.dataset.name = name;
    if (buttons) return this.#buttons(cell, buttons);
    const node = cell.appendChild(document.createTextNode(""));
    const showLevel = level && newBar(cell);
    return (row) => {
      const shown = text(row);
      if (node.data !== shown) node.data = shown;
      if (hint && cell.title !== hint(row)) cell.title = hint(row);
      showLevel?.(level(row));
    };
  }

  #buttons(cell, buttons) {
    cell.dataset.kind = "buttons";
    const shown = buttons.map(({ text, label, isShown = () => true, act }) => {
      const button = cell.appendChild(document.createElement("button"));
      button.type = "button";
      button.className = "quiet-button";
      button.addEventListener("click", () => act(this.#row));
      return (row) => {
        if (button.hidden === isShown(row)) button.hidden = !isShown(row);
        if (button.textContent !== text(row)) button.textContent = text(row);
        if (button.ariaLabel !== label(row)) button.ariaLabel = label(row);
      };
    });
    return (row) => shown.forEach((show) => show(row));
  }
}

/** For who listens; who looks sees buttons. */
function newHiddenName(text) {
  const node = document.createElement("span");
  node.className = "visually-hidden";
  node.textContent = text;
  return node;
}

/** A bar at the end of a cell; returns what fills it up to a part. */
function newBar(cell) {
  const track = cell.appendChild(document.createElement("span"));
  track.className = "track";
  track.ariaHidden = "true";
  const bar = track.appendChild(document.createElement("span"));
  let shown = "";
  return (part) => {
    const scale = `scaleX(${Math.min(1, Math.max(0, part || 0)).toFixed(3)})`;
    if (scale !== shown) bar.style.transform = shown = scale;
  };
}
