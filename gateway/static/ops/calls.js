// Calls of the operations page, and what is said when one fails.

import { HeadraceError } from "../headrace.js";
import { $, authorization, BASE_URL } from "../page.js";
import { describeFailure } from "../wording.js";

const ACCESS = [
  "INVALID_API_KEY",
  "AUTH_MISSING",
  "AUTH_INVALID",
  "AUTH_EXPIRED",
  "SCOPE_DENIED",
  "PERMISSION_ERROR",
];

/** @throws {HeadraceError} */
export async function call(method, path) {
  const lost = () => Promise.reject(new HeadraceError("CONNECTION_LOST", ""));
  const response = await fetch(BASE_URL + path, {
    method,
    cache: "no-store",
    headers: authorization(),
  }).catch(lost);
  const answer = await response.json().catch(() => null);
  if (response.ok) return answer;
  // Outside of `/v1` the code stands beside the message.
  const { code, message } =
    typeof answer?.error === "string"
      ? { code: answer.code, message: answer.error }
      : (answer?.error ?? {});
  throw new HeadraceError((code ?? `HTTP_${response.status}`).toUpperCase(), message ?? "", {
    status: response.status,
  });
}

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
