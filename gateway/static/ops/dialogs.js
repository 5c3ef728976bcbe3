// Questions before something is done, and windows with details. The browser keeps the keyboard inside
// of them, ends them on Escape, and gives the focus back.

import { $ } from "../page.js";

/**
 * Asks before something is done.
 *
 * @param {string} title  The question.
 * @param {string} consequence  What will happen.
 * @param {string} deed  The word on the button.
 * @returns {Promise<boolean>}
 */
export function ask(title, consequence, deed) {
  const dialog = $("question");
  $("question-title").textContent = title;
  dialog.querySelector("p").textContent = consequence;
  dialog.querySelector("[value=yes]").textContent = deed;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Opens the window with details; what is in it is put there by `fill`, at once or when it is known. */
export async function showDetails(title, fill) {
  const [dialog, body] = [$("details"), $("details-body")];
  $("details-title").textContent = title;
  body.replaceChildren(paragraph("One moment…"));
  dialog.showModal();
  try {
    body.replaceChildren(...(await fill()));
  } catch (error) {
    body.replaceChildren(paragraph(error.message || error.code));
  }
}

export function paragraph(text, className = "") {
  const node = document.createElement("p");
  node.textContent = text;
  node.className = className;
  return node;
}

/** A command with a button that copies it. */
export function newCommand(text) {
  const box = document.createElement("div");
  box.className = "command";
  const code = box.appendChild(document.createElement("code"));
  code.tabIndex = 0; // it scrolls, so the keyboard must get there
  code.textContent = text;
  const button = box.appendChild(document.createElement("button"));
  button.type = "button";
  button.className = "quiet-button";
  button.textContent = "Copy";
  connectCopy(button, code);
  return box;
}

/** Copies what stands in `code`; where the browser has no clipboard for us it is selected instead. */
export function connectCopy(button, code) {
  button.addEventListener("click", async () => {
    const copied = await navigator.clipboard?.writeText(code.textContent).then(
      () => true,
      () => false,
    );
    if (!copied) getSelection()?.selectAllChildren(code);
    button.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
}

/** What is known of something, as names and values in this order; what is not known is left out. */
export function newFacts(facts) {
  const list = document.createElement("dl");
  list.className = "facts";
  for (const [name, value] of Object.entries(facts)) {
    if (value === null || value === undefined || value === "") continue;
    list.appendChild(document.createElement("dt")).textContent = name.replaceAll("_", " ");
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    list.appendChild(document.createElement("dd")).textContent = text;
  }
  return list;
}
