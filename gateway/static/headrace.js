// A client for Headrace's chat streams. They survive a lost connection: whoever knows a stream's id
// and the cursor of the last event it saw gets the exact rest, from any gateway, at any time.
//
//   const answer = await streamChat({ body: { model, messages }, onText: (piece) => show(piece) });
//
// Keep what `onText` and `onState` hand over (it is plain JSON) and pass it to `resume` after a
// reload. No dependencies; needs fetch, ReadableStream and AbortSignal.any.

/**
 * Where a reader stands. Plain JSON: store it, and `resume` goes on from it. The client changes it
 * in place, text and cursor in one go, so a copy taken at any moment is consistent.
 *
 * @typedef {object} Progress
 * @property {string} id  Of the stream; "" until the gateway has admitted the request.
 * @property {string} cursor  Behind the last event that is in this object; "" is the beginning.
 * @property {string} text  The answer so far.
 * @property {string|null} finishReason  "eos_token", "stop_sequence", "length" or "cancelled"; null
 *   until the end is known.
 * @property {Stats|null} stats  Comes with the end.
 */

/**
 * What the gateway measured, times in seconds.
 *
 * @typedef {object} Stats
 * @property {number} queue_time
 * @property {number|null} time_to_first_token  null when no token was made.
 * @property {number} generation_time
 * @property {number} tokens_per_second
 * @property {string} model_version
 * @property {number} attempts  Above 1: another worker continued what the first one began.
 */

/**
 * connecting: nothing is known yet · waiting: admitted, no text yet · streaming: text arrives ·
 * reconnecting: the connection is lost, and is tried again until `giveUpAfterMs`.
 *
 * @typedef {"connecting"|"waiting"|"streaming"|"reconnecting"} State
 */

/**
 * @typedef {object} Options
 * @property {string} [baseUrl]  Of the gateway, without a slash at its end; default: this origin.
 * @property {Record<string, string>} [headers]  Sent with every call.
 * @property {(piece: string, progress: Progress) => void} [onText]
 * @property {(state: State, progress: Progress) => void} [onState]
 * @property {AbortSignal} [signal]  Stops reading; the generation goes on. `cancel` ends it.
 * @property {number} [silenceMs]  A connection this silent is dead. The gateway sends a comment
 *   every 15 s; default: three times that.
 * @property {number} [giveUpAfterMs]  How long to try again after the last sign of life; default
 *   ten minutes, which is as long as a gateway keeps an ended stream by default.
 */

const SILENCE_MS = 45_000;
const GIVE_UP_AFTER_MS = 600_000;
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 5_000;
const CANCEL_ATTEMPTS = 6;

/** Why there is no (whole) answer. `code` is one of the gateway's, or CONNECTION_LOST, BAD_ANSWER. */
export class HeadraceError extends Error {
  /**
   * @param {string} code
   * @param {string} message
   * @param {{status?: number, isTransient?: boolean, retryAfterMs?: number|null, cause?: unknown}}
   *   [detail]  `isTransient`: the same call may succeed a little later.
   */
  constructor(code, message, { status = 0, isTransient = false, retryAfterMs = null, cause } = {}) {
    super(message, { cause });
    this.name = "HeadraceError";
    this.code = code;
    this.status = status;
    this.isTransient = isTransient;
    this.retryAfterMs = retryAfterMs;
  }
}

/**
 * Sends a chat request and reads its answer to the end, through any number of lost connections.
 *
 * @param {Options & {body: object}} options  `body` as for POST /v1/chat/completions.
 * @returns {Promise<Progress>}  The whole answer.
 * @throws {HeadraceError}  What was read until then has gone to `onText`.
 */
export async function streamChat({ body, ...options }) {
  const progress = { id: "", cursor: "", text: "", finishReason: null, stats: null };
  options.onState?.("connecting", progress);
  const connection = await connect(options, "/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const { response } = connection;
  progress.id = response.headers.get("x-headrace-stream-id") ?? "";
  if (!progress.id || !isEventStream(response)) {
    connection.close();
    throw new HeadraceError("BAD_ANSWER", "The server's answer is no resumable stream.");
  }
  return follow(progress, options, connection);
}

/**
 * Reads a stream on from `progress` to its end; `text` and `cursor` go on where they stand.
 *
 * @param {Options & {progress: Progress}} options
 * @returns {Promise<Progress>}  `finishReason` is null if the stream had ended before the cursor.
 * @throws {HeadraceError}
 */
export async function resume({ progress, ...options }) {
  const own = { ...progress };
  options.onState?.("reconnecting", own);
  return follow(own, options, null);
}

/**
 * Ends a generation for good; its readers get what was made until then. A stream that has ended or
 * is unknown is left as it is.
 *
 * @param {Pick<Options, "baseUrl"|"headers"|"silenceMs"> & {id: string}} options
 * @throws {HeadraceError}  The gateway could not be told.
 */
export async function cancel({ id, ...options }) {
  for (let attempt = 1; ; attempt++) {
    try {
      (await connect(options, streamPath(id), { method: "DELETE" })).close();
      return;
    } catch (error) {
      if (error.status === 404 || error.status === 410) return;
      if (!error.isTransient || attempt === CANCEL_ATTEMPTS) throw error;
      await pause(attempt, error.retryAfterMs);
    }
  }
}

// Following a stream ------------------------------------------------------------------------------

/** Reads until the end, over as many connections as it takes. */
async function follow(progress, options, connection) {
  const { onState, signal, giveUpAfterMs = GIVE_UP_AFTER_MS } = options;
  let failures = 0;
  let aliveAt = performance.now();
  for (;;) {
    const cursor = progress.cursor;
    let failure = brokenOff();
    try {
      connection ??= await reconnect(progress, options);
      if (await relay(connection, progress, options)) return progress;
    } catch (error) {
      if (!error?.isTransient) throw error;
      failure = error;
    } finally {
      connection?.close();
      connection = null;
    }
    if (progress.cursor !== cursor) {
      failures = 0;
      aliveAt = performance.now();
    }
    if (performance.now() - aliveAt > giveUpAfterMs) throw failure;
    onState?.("reconnecting", progress);
    await pause(++failures, failure.retryAfterMs, signal);
  }
}

async function reconnect(progress, options) {
  const after = progress.cursor ? `?after=${encodeURIComponent(progress.cursor)}` : "";
  return connect(options, streamPath(progress.id) + after, { method: "GET" });
}

/** Applies one connection's events; true when the stream has ended, false when it broke off. */
async function relay({ response, chunks }, progress, options) {
  if (response.status === 204) return true; // nothing is behind the cursor, and nothing will be
  options.onState?.(progress.text ? "streaming" : "waiting", progress);
  for await (const event of parseEvents(chunks)) {
    const hadText = progress.text !== "";
    const piece = event.data === "[DONE]" ? "" : apply(event, progress);
    progress.text += piece;
    progress.cursor = event.id || progress.cursor;
    if (piece && !hadText) options.onState?.("streaming", progress);
    if (piece) options.onText?.(piece, progress);
    if (event.data === "[DONE]") return true;
  }
  return false;
}

/** Takes a frame's news into `progress`, all but text and cursor; returns the text. */
function apply(event, progress) {
  const frame = parseFrame(event.data);
  if (frame.error) throw failureOfStream(event, frame.error, progress);
  const choice = frame.choices?.[0];
  const { finish_reason: reason, ...stats } = frame.headrace ?? {};
  if (frame.headrace) progress.stats = stats;
  // OpenAI's field has no word for "cancelled"; the one in `headrace` does.
  progress.finishReason = reason ?? choice?.finish_reason ?? progress.finishReason;
  return choice?.delta?.content ?? "";
}

/**
 * An error with a cursor of its own is how the generation ended. One without is about this
 * connection (the gateway stops, or lost its Redis): the stream can be read on from the last cursor.
 */
function failureOfStream(event, error, progress) {
  const isOfConnection = event.id === "" || event.id === progress.cursor;
  const status = error.http_status_code ?? 0;
  return failureFrom(error, { status, isTransient: isOfConnection && status >= 500 });
}

function parseFrame(data) {
  try {
    return JSON.parse(data);
  } catch (cause) {
    throw new HeadraceError("BAD_ANSWER", "A frame of the stream is not JSON.", { cause });
  }
}

const streamPath = (id) => `/v1/streams/${encodeURIComponent(id)}`;

// Connections -------------------------------------------------------------------------------------

/**
 * One call: an answer of status 2xx, its body as chunks, and `close`. Everything else is thrown as
 * a HeadraceError, except the caller's own abort, which keeps its reason.
 */
async function connect({ baseUrl = "", headers, signal, silenceMs = SILENCE_MS }, path, init) {
  const abort = new AbortController();
  let timer = 0;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => abort.abort(), silenceMs);
  };
  const close = () => {
    clearTimeout(timer);
    abort.abort();
  };
  const lost = (cause) => {
    close();
    if (signal?.aborted) return signal.reason;
    return brokenOff(cause);
  };
  heard();
  const response = await fetch(baseUrl + path, {
    ...init,
    headers: { ...init.headers, ...headers },
    cache: "no-store",
    signal: signal ? AbortSignal.any([signal, abort.signal]) : abort.signal,
  }).catch((cause) => Promise.reject(lost(cause)));
  if (!response.ok) {
    const failure = await failureOf(response);
    close();
    throw failure;
  }
  async function* chunks() {
    const reader = response.body?.getReader();
    while (reader) {
      heard();
      const { done, value } = await reader.read().catch((cause) => Promise.reject(lost(cause)));
      if (done) return;
      yield value;
    }
  }
  return { response, chunks: chunks(), close };
}

function isEventStream(response) {
  return response.headers.get("content-type")?.startsWith("text/event-stream") ?? false;
}

function brokenOff(cause) {
  const message = "The connection to the gateway broke, or never came about.";
  return new HeadraceError("CONNECTION_LOST", message, { isTransient: true, cause });
}

async function failureOf(response) {
  const { status, headers } = response;
  const body = await response.json().catch(() => ({}));
  const wait = headers.get("retry-after-ms") ?? Number(headers.get("retry-after")) * 1000;
  return failureFrom(body?.error ?? {}, {
    status,
    isTransient: status >= 500 || status === 429 || status === 408,
    retryAfterMs: Number(wait) || null,
  });
}

function failureFrom({ code, message }, detail) {
  const name = String(code ?? `HTTP_${detail.status}`).toUpperCase();
  return new HeadraceError(name, message ?? "The gateway gave no reason.", detail);
}

/** Waits longer after each failure, each client differently; ends early when the network is back. */
function pause(failures, retryAfterMs, signal) {
  const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (failures - 1));
  const jittered = longest * (0.5 + Math.random() / 2);
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      globalThis.removeEventListener?.("online", end);
      signal?.removeEventListener("abort", end);
      if (signal?.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setTimeout(end, Math.max(jittered, retryAfterMs ?? 0));
    globalThis.addEventListener?.("online", end);
    signal?.addEventListener("abort", end);
    if (signal?.aborted) end();
  });
}

// Server-sent events ------------------------------------------------------------------------------

/**
 * Server-sent events from UTF-8 chunks cut anywhere, by the rules of the HTML standard (9.2.6):
 * lines end with LF, CR or CRLF, a blank line dispatches, `id` sticks, an unfinished event at the
 * end of the stream is dropped.
 *
 * @param {AsyncIterable<Uint8Array>} chunks
 * @returns {AsyncGenerator<{id: string, type: string, data: string}>}
 */
export async function* parseEvents(chunks) {
  let id = "";
  let type = "";
  let data = [];
  for await (const line of linesOf(chunks)) {
    if (line === "") {
      if (data.length) yield { id, type: type || "message", data: data.join("\n") };
      type = "";
      data = [];
      continue;
    }
    const [, field, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line);
    if (field === "data") data.push(value ?? "");
    else if (field === "event") type = value ?? "";
    else if (field === "id" && !value?.includes("\0")) id = value ?? "";
  }
}

async function* linesOf(chunks) {
  const decoder = new TextDecoder(); // drops a byte order mark, as the standard asks
  let rest = "";
  let endedWithCr = false;
  for await (const chunk of chunks) {
    let text = decoder.decode(chunk, { stream: true });
    if (!text) continue;
    if (endedWithCr && text.startsWith("\n")) text = text.slice(1);
    endedWithCr = text.endsWith("\r");
    const lines = (rest + text).split(/\r\n|\r|\n/);
    rest = lines.pop();
    yield* lines;
  }
}
