// What the pages share: where the gateway is, the key for it, how it is called, and what is said to
// screen readers.

import { HeadraceError } from "./headrace.js";

export const BASE_URL = new URL("..", import.meta.url).href.replace(/\/$/, "");
const MAX_ANNOUNCEMENTS = 20;

export const $ = (id) => document.getElementById(id);

export function authorization() {
  const key = $("api-key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

/** Says something to screen readers, after what they are saying. */
export function announce(text) {
  const line = document.createElement("p");
  line.textContent = text;
  $("announcer").append(line);
  while ($("announcer").children.length > MAX_ANNOUNCEMENTS) $("announcer").firstChild.remove();
}

/**
 * The JSON that a route answers.
 * @throws {HeadraceError}
 */
export async function call(method, path, body) {
  const response = await fetch(BASE_URL + path, {
    method,
    cache: "no-store",
    headers: { ...authorization(), ...(body && { "content-type": "application/json" }) },
    body: body && JSON.stringify(body),
  }).catch(() => Promise.reject(lost()));
  const answer = await response.json().catch(() => null);
  if (!response.ok) throw failureFrom(response.status, answer);
  return answer;
}

export function lost() {
  return new HeadraceError("CONNECTION_LOST", "");
}

/** Outside of `/v1` the code stands beside the message. */
export function failureFrom(status, answer) {
  const { code, message } =
    typeof answer?.error === "string"
      ? { code: answer.code, message: answer.error }
      : (answer?.error ?? {});
  return new HeadraceError((code ?? `HTTP_${status}`).toUpperCase(), message ?? "", { status });
}
