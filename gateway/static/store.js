// What the page remembers: one conversation and the settings, in the browser only.

const CHAT_KEY = "headrace.chat";
const SETTINGS_KEY = "headrace.settings";
const API_KEY = "headrace.key";
const LOCK = "headrace.chat";
/** Longer than the page that was just reloaded needs to let go of the lock. */
const LOCK_WAIT_MS = 500;
/** A page that is killed forgets at most this much; it reads it again from the stream. */
const SAVE_EVERY_MS = 250;

/**
 * Opens the memory of this tab. The first tab has the conversation that outlives the browser; a
 * second one would overwrite it, so it gets one of its own that ends with the tab.
 *
 * @returns {Promise<Store>}
 */
export async function openStore() {
  const [lasting, ofThisTab] = [storage("localStorage"), storage("sessionStorage")];
  const hasOwn = Boolean(ofThisTab?.getItem(CHAT_KEY));
  return new Store(!hasOwn && (await isOnlyTab()) ? lasting : ofThisTab, lasting, ofThisTab);
}

/**
 * Only the key of this tab, for a page without a conversation.
 *
 * @returns {Pick<Store, "loadApiKey"|"saveApiKey">}
 */
export function openKey() {
  return new Store(null, null, storage("sessionStorage"));
}

/** Null where the browser forbids the page to keep anything. */
function storage(name) {
  try {
    return globalThis[name];
  } catch {
    return null;
  }
}

/** Holds a lock for as long as the page lives; where locks are missing, every tab is the only one. */
function isOnlyTab() {
  if (!navigator.locks) return true; // only on https and localhost
  return new Promise((resolve) => {
    const held = navigator.locks.request(LOCK, { signal: AbortSignal.timeout(LOCK_WAIT_MS) }, () => {
      resolve(true);
      return new Promise(() => {});
    });
    held.catch(() => resolve(false));
  });
}

class Store {
  /** @type {() => void} Called once, when this browser refuses to remember anything. */
  onRefused = () => {};
  #chats;
  #settings;
  #ofThisTab;
  #timer = 0;
  #pending = null;
  #isRefused = false;

  constructor(chats, settings, ofThisTab) {
    this.#chats = chats;
    this.#settings = settings;
    this.#ofThisTab = ofThisTab;
    addEventListener("pagehide", () => this.#flush());
    addEventListener("visibilitychange", () => this.#flush());
  }

  /** @returns {object[]} The turns of the conversation. */
  loadTurns() {
    const turns = read(this.#chats, CHAT_KEY);
    return Array.isArray(turns) && turns.every(isTurn) ? turns : [];
  }

  saveTurns(turns) {
    this.#pending = turns;
    this.#flush();
  }

  /** As `saveTurns`, a moment later; for what changes with every token. */
  saveTurnsSoon(turns) {
    this.#pending = turns;
    this.#timer ||= setTimeout(() => this.#flush(), SAVE_EVERY_MS);
  }

  loadSettings() {
    return read(this.#settings, SETTINGS_KEY) ?? {};
  }

  saveSettings(settings) {
    this.#write(this.#settings, SETTINGS_KEY, settings);
  }

  /** Ends with the tab: a secret is not left in a browser that others use. */
  loadApiKey() {
    return read(this.#ofThisTab, API_KEY) ?? "";
  }

  saveApiKey(key) {
    this.#write(this.#ofThisTab, API_KEY, key);
  }

  #flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    if (this.#pending) this.#write(this.#chats, CHAT_KEY, this.#pending);
    this.#pending = null;
  }

  #write(storage, key, value) {
    try {
      storage.setItem(key, JSON.stringify(value));
    } catch {
      if (!this.#isRefused) this.onRefused();
      this.#isRefused = true;
    }
  }
}

/** Whether this page wrote it, and not an earlier version that wrote something else. */
function isTurn(turn) {
  if (turn?.role === "user") return typeof turn.text === "string";
  return turn?.role === "assistant" && typeof (turn.progress?.text ?? "") === "string";
}

function read(storage, key) {
  try {
    return JSON.parse(storage.getItem(key));
  } catch {
    return null; // nothing may be kept here, or somebody else wrote under this name
  }
}
