// What the operations page says when something fails.

import { HeadraceError } from "../headrace.js";
import { $ } from "../page.js";
import { describeFailure } from "../wording.js";

const ACCESS = [
  "INVALID_API_KEY",
  "AUTH_MISSING",
  "AUTH_INVALID",
  "AUTH_EXPIRED",
  "SCOPE_DENIED",
  "PERMISSION_ERROR",
];

/**
 * @param {Error|null} error  null: there is none any more.
 * @param {string} [of]  Whose problem it is, so that who has it no more can take it away.
 */
export function showProblem(error, of = "") {
  const box = $("problem");
  box.hidden = !error;
  box.dataset.of = of;
  if (!error) return;
  const isOurs = !(error instanceof HeadraceError);
  if (isOurs) console.error(error);
  const code = isOurs ? "PAGE_ERROR" : error.code;
  const [sentence, codeShown] = box.children;
  // What the gateway says of workers and dead letters is more exact than what is said of answers.
  sentence.textContent = (!isOurs && error.message) || describeFailure({ code });
  codeShown.textContent = code;
  if (ACCESS.includes(code)) {
    $("settings").open = true;
    $("api-key").focus();
  }
}
