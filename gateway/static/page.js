// What the pages share: where the gateway is, the key for it, and what is said to screen readers.

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
