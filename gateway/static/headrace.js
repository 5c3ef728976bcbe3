// A client for Headrace's streams. They survive a lost connection: whoever knows a stream's id and the
// cursor of the last event it saw gets the exact rest, from any gateway, at any time.
//
//   const answer = await streamChat({ body: { model, messages }, onText: (piece) => show(piece) });
//
// Keep what `onText` and `onState` hand over (it is plain JSON) and pass it to `resume` after a
// reload. `watch` reads with the browser's own EventSource, for pages that have no API key. No
// dependencies; needs fetch, ReadableStream and AbortSignal.any: browsers since 2023, Node 20.

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
 * A server-sent event.
 *
 * @typedef {{id: string, type: string, data: string}} StreamEvent
 */

/**
 * @typedef {object} Connection
 * @property {Response} response
 * @property {AsyncIterable<Uint8Array>} chunks  Of its body.
 * @property {() => void} close
 */

/**
 * connecting: nothing is known yet · waiting: admitted, no text yet · streaming: text arrives ·
 * reconnecting: the connection is lost, and is tried again until `giveUpAfterMs`.
 *
 * @typedef {"connecting"|"waiting"|"streaming"|"reconnecting"} State
 */

/**
 * The place of a request that no worker has yet.
 *
 * @typedef {object} Place
 * @property {boolean} isWaiting  False once a worker has it; then the first text is near.
 * @property {number} position  Requests that are served before it.
 * @property {number|null} estimatedWait  In seconds; null where nothing is known yet.
 */

/**
 * @typedef {object} Options
 * @property {string|string[]} [baseUrl]  Of the gateway, or of several, which are tried in turn,
 *   without a slash at the end; default: this origin.
 * @property {Record<string, string>} [headers]  Sent with every call.
 * @property {(piece: string, progress: Progress) => void} [onText]
 * @property {(state: State, progress: Progress) => void} [onState]
 * @property {(place: Place, progress: Progress) => void} [onPlace]  About once a second while the
 *   request waits.
 * @property {AbortSignal} [signal]  Stops reading; the generation goes on. `cancel` ends it.
 * @property {number} [silenceMs]  A connection this silent is dead. The gateway sends a comment
 *   every 15 s; default: three times that.
 * @property {number} [giveUpAfterMs]  How long to try again after the last sign of life; default
 *   ten minutes, which is as long as a gateway keeps an ended stream by default.
 */

/**
 * Where a reader of a batch stands. Plain JSON: store it, and `followBatch` goes on from it.
 *
 * @typedef {object} BatchProgress
 * @property {string} id
 * @property {string} cursor  Behind the last line that went to `onLine`; "" is the beginning.
 * @property {number} heard  Events so far.
 * @property {any} batch  As `GET /v1/batches/{id}` shows it; null until the first event.
 */

/**
 * @typedef {object} BatchOptions
 * @property {string|string[]} [baseUrl]  As for a stream.
 * @property {Record<string, string>} [headers]  As for a stream.
 * @property {(batch: any, progress: BatchProgress) => void} [onBatch]  Whenever it has changed.
 * @property {(line: any, progress: BatchProgress) => void} [onLine]  Each finished line, as it will
 *   stand in the output or the error file. Without it no lines are sent.
 * @property {(state: State, progress: BatchProgress) => void} [onState]
 * @property {AbortSignal} [signal]  Stops reading; the batch goes on.
 * @property {number} [silenceMs]  As for a stream.
 * @property {number} [giveUpAfterMs]  As for a stream.
 */

/**
 * Where a reader of the live figures stands.
 *
 * @typedef {{cursor: string}} FeedProgress
 */

/**
 * @typedef {object} FeedOptions
 * @property {string|string[]} [baseUrl]  As for a stream.
 * @property {Record<string, string>} [headers]  As for a stream.
 * @property {(overview: any, progress: FeedProgress) => void} onOverview  The pool in one second.
 * @property {(columns: any, progress: FeedProgress) => void} [onHistory]  The minutes before, by name
 *   of the figure; once at the beginning, and again when too much was missed.
 * @property {(state: State, progress: FeedProgress) => void} [onState]
 * @property {AbortSignal} [signal]
 * @property {number} [silenceMs]  As for a stream.
 * @property {number} [giveUpAfterMs]  As for a stream.
 */

const SILENCE_MS = 45_000;
const GIVE_UP_AFTER_MS = 600_000;
const FIRST_PAUSE_MS = 250;
const LONGEST_PAUSE_MS = 5_000;
const ATTEMPTS = 6;
/** A request that met one of these may be sent again: it did not arrive, or nobody knows. */
const NOT_TAKEN = ["CONNECTION_LOST", "DRAINING", "HTTP_502", "HTTP_503", "HTTP_504"];

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
 * It carries an idempotency key, so that a request whose answer was lost is sent again without
 * being worked on twice. Of several choices (`n`) the first is read.
 *
 * @param {Options & {body: object, idempotencyKey?: string}} options  `body` as for POST
 *   /v1/chat/completions; `idempotencyKey`, by default a new one, finds the same answer again, for
 *   as long as it is kept.
 * @returns {Promise<Progress>}  The whole answer.
 * @throws {HeadraceError}  What was read until then has gone to `onText`.
 */
export async function streamChat({ body, idempotencyKey = newKey(), ...options }) {
  const progress = newProgress();
  const gateways = new Gateways(options.baseUrl);
  options.onState?.("connecting", progress);
  const connection = await persist(gateways, options.signal, NOT_TAKEN, () =>
    connect(options, `${gateways.current}/v1/chat/completions`, {
      method: "POST",
      headers: {
        "content-type": "application/json",
        "idempotency-key": idempotencyKey,
        ...(options.onPlace && { "x-stream-events": "1" }),
      },
      body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    }),
  );
  const { response } = connection;
  progress.id = response.headers.get("x-headrace-stream-id") ?? "";
  if (!progress.id || !isEventStream(response)) {
    connection.close();
    throw new HeadraceError("BAD_ANSWER", "The server's answer is no resumable stream.");
  }
  const reconnect = () => reconnectTo(gateways, progress, options);
  return follow(progress, options, gateways, reconnect, connection);
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
  const gateways = new Gateways(options.baseUrl);
  options.onState?.("reconnecting", own);
  return follow(own, options, gateways, () => reconnectTo(gateways, own, options), null);
}

/**
 * Reads a stream to its end with the browser's EventSource, which needs no API key but a token in
 * the address. The browser reconnects by itself; where it gives up, this asks for a new address.
 *
 * @param {Options & {id: string, progress?: Progress, getUrl?: () => string|Promise<string>}}
 *   options  `getUrl` brings an address with a token, usually from the page's own server, which has
 *   the key: what `POST /v1/streams/{id}/token` answers as `url`. Without it the gateway is asked,
 *   with `headers`. `silenceMs` means nothing here.
 * @returns {Promise<Progress>}
 * @throws {HeadraceError}
 */
export async function watch({ id, progress = newProgress(id), getUrl, ...options }) {
  const own = { ...progress };
  const gateways = new Gateways(options.baseUrl);
  options.onState?.("connecting", own);
  const listenAnew = async () => {
    const url = await (getUrl ? getUrl() : tokenUrl(gateways, id, options));
    const full = new URL(url, gateways.current || globalThis.location?.href);
    if (own.cursor) full.searchParams.set("after", own.cursor);
    if (options.onPlace) full.searchParams.set("events", "1");
    return listen(full, own, options);
  };
  return untilEnd(own, options, gateways, listenAnew);
}

/**
 * Follows a batch to its end, through any number of lost connections.
 *
 * @param {BatchOptions & {id: string, cursor?: string}} options  `cursor`: go on behind it.
 * @returns {Promise<BatchProgress>}
 * @throws {HeadraceError}
 */
export async function followBatch({ id, cursor = "", ...options }) {
  /** @type {BatchProgress} */
  const progress = { id, cursor, heard: 0, batch: null };
  const gateways = new Gateways(options.baseUrl);
  const heard = () => progress.heard;
  return untilEnd(progress, options, gateways, () => readBatch(gateways, progress, options), heard);
}

/**
 * Follows the live figures of the pool, one overview a second, through any number of lost
 * connections, until `signal` ends it.
 *
 * @param {FeedOptions & {cursor?: string}} options  `cursor`: go on behind it.
 * @returns {Promise<FeedProgress>}
 * @throws {HeadraceError}
 */
export async function followFeed({ cursor = "", ...options }) {
  /** @type {FeedProgress} */
  const progress = { cursor };
  const gateways = new Gateways(options.baseUrl);
  return untilEnd(progress, options, gateways, () => readFeed(gateways, progress, options));
}

/**
 * Ends a generation for good; its readers get what was made until then. A stream that has ended or
 * is unknown is left as it is.
 *
 * @param {Pick<Options, "baseUrl"|"headers"|"silenceMs"> & {id: string}} options
 * @throws {HeadraceError}  The gateway could not be told.
 */
export async function cancel({ id, ...options }) {
  const gateways = new Gateways(options.baseUrl);
  try {
    const end = () => connect(options, gateways.current + streamPath(id), { method: "DELETE" });
    (await persist(gateways, undefined, null, end)).close();
  } catch (error) {
    if (error instanceof HeadraceError && [404, 410].includes(error.status)) return;
    throw error;
  }
}

// Following a stream ------------------------------------------------------------------------------

/**
 * Reads until the end, over as many connections as it takes.
 *
 * @param {Progress} progress
 * @param {Options} options
 * @param {Gateways} gateways
 * @param {() => Promise<Connection>} reconnect
 * @param {Connection|null} connection  One that is open already.
 */
function follow(progress, options, gateways, reconnect, connection) {
  return untilEnd(progress, options, gateways, async () => {
    const open = connection ?? (await reconnect());
    connection = null;
    try {
      return await relay(open, progress, options);
    } finally {
      open.close();
    }
  });
}

/**
 * Reads again and again, each time elsewhere, until `read` says that the end was reached.
 *
 * @template {{cursor: string}} P
 * @param {P} progress
 * @param {{onState?: (state: State, progress: P) => void, signal?: AbortSignal, giveUpAfterMs?:
 *   number}} options
 * @param {Gateways} gateways
 * @param {() => Promise<boolean>} read
 * @param {() => string|number} [place]  Differs once there was a sign of life.
 */
async function untilEnd(progress, options, gateways, read, place = () => progress.cursor) {
  const { onState, signal, giveUpAfterMs = GIVE_UP_AFTER_MS } = options;
  let failures = 0;
  let aliveAt = performance.now();
  for (;;) {
    const before = place();
    let failure = brokenOff();
    try {
      if (await read()) return progress;
    } catch (error) {
      if (!(error instanceof HeadraceError) || !error.isTransient) throw error;
      failure = error;
    }
    if (place() !== before) {
      failures = 0;
      aliveAt = performance.now();
    }
    if (performance.now() - aliveAt > giveUpAfterMs) throw failure;
    onState?.("reconnecting", progress);
    gateways.turn();
    await pause(++failures, failure.retryAfterMs, signal);
  }
}

/**
 * @param {Gateways} gateways
 * @param {Progress} progress
 * @param {Options} options
 */
function reconnectTo(gateways, progress, options) {
  const query = new URLSearchParams();
  if (progress.cursor) query.set("after", progress.cursor);
  if (options.onPlace) query.set("events", "1");
  const url = `${gateways.current}${streamPath(progress.id)}${query.size ? `?${query}` : ""}`;
  return connect(options, url, { method: "GET" });
}

/**
 * Applies one connection's events of a batch; true when it has ended, false when it broke off.
 *
 * @param {Gateways} gateways
 * @param {BatchProgress} progress
 * @param {BatchOptions} options
 */
async function readBatch(gateways, progress, options) {
  const query = new URLSearchParams(options.onLine ? {} : { lines: "0" });
  if (progress.cursor) query.set("starting_after", progress.cursor);
  const path = `/v1/batches/${encodeURIComponent(progress.id)}/events`;
  const url = `${gateways.current}${path}${query.size ? `?${query}` : ""}`;
  const { response, chunks, close } = await connect(options, url, { method: "GET" });
  try {
    if (response.status === 204) return true;
    options.onState?.("streaming", progress);
    for await (const event of parseEvents(chunks)) {
      const data = parseFrame(event.data);
      if (data.error) throw failureOfStream(event, data.error, progress);
      progress.heard++;
      progress.cursor = event.id || progress.cursor;
      if (event.type === "line") options.onLine?.(data, progress);
      else options.onBatch?.((progress.batch = data), progress);
      if (event.type === "done") return true;
    }
    return false;
  } finally {
    close();
  }
}

/**
 * Applies one connection's overviews; false, as they have no end.
 *
 * @param {Gateways} gateways
 * @param {FeedProgress} progress
 * @param {FeedOptions} options
 */
async function readFeed(gateways, progress, options) {
  const headers = progress.cursor ? { "last-event-id": progress.cursor } : undefined;
  const { chunks, close } = await connect(options, `${gateways.current}/ops/feed`, { headers });
  try {
    options.onState?.("streaming", progress);
    for await (const event of parseEvents(chunks)) {
      const data = parseFrame(event.data);
      if (data.error) throw failureOfStream(event, data.error, progress);
      progress.cursor = event.id || progress.cursor;
      if (event.type === "history") options.onHistory?.(data, progress);
      else options.onOverview(data, progress);
    }
    return false;
  } finally {
    close();
  }
}

/**
 * Applies one connection's events; true when the stream has ended, false when it broke off.
 *
 * @param {Connection} connection
 * @param {Progress} progress
 * @param {Options} options
 */
async function relay({ response, chunks }, progress, options) {
  if (response.status === 204) return true; // nothing is behind the cursor, and nothing will be
  options.onState?.(progress.text ? "streaming" : "waiting", progress);
  for await (const event of parseEvents(chunks)) {
    if (take(event, progress, options)) return true;
  }
  return false;
}

/**
 * Applies one event; true when it was the last one.
 *
 * @param {StreamEvent} event
 * @param {Progress} progress
 * @param {Options} options
 */
function take(event, progress, options) {
  if (event.type === "queue") {
    options.onPlace?.(placeOf(parseFrame(event.data)), progress);
    return false;
  }
  const hadText = progress.text !== "";
  const piece = event.data === "[DONE]" ? "" : apply(event, progress);
  progress.text += piece;
  progress.cursor = event.id || progress.cursor;
  if (piece && !hadText) options.onState?.("streaming", progress);
  if (piece) options.onText?.(piece, progress);
  return event.data === "[DONE]";
}

/**
 * Takes a frame's news into `progress`, all but text and cursor; returns the text.
 *
 * @param {StreamEvent} event
 * @param {Progress} progress
 * @returns {string}
 */
function apply(event, progress) {
  const frame = parseFrame(event.data);
  if (frame.error) throw failureOfStream(event, frame.error, progress);
  const choice = frame.choices?.find((/** @type {{index: number}} */ { index }) => index === 0);
  const { finish_reason: reason, ...stats } = frame.headrace ?? {};
  if (frame.headrace) progress.stats = stats;
  // OpenAI's field has no word for "cancelled"; the one in `headrace` does.
  progress.finishReason = reason ?? choice?.finish_reason ?? progress.finishReason;
  const ownToken = frame.token?.special === false ? frame.token.text : "";
  return choice?.delta?.content ?? choice?.text ?? ownToken;
}

/**
 * @param {{state: string, position?: number, estimated_wait?: number|null}} told
 * @returns {Place}
 */
function placeOf({ state, position = 0, estimated_wait: estimatedWait = 0 }) {
  return { isWaiting: state === "waiting", position, estimatedWait };
}

/**
 * An error with a cursor of its own is how the generation ended. One without is about this
 * connection (the gateway stops, or lost its Redis): the stream can be read on from the last cursor.
 *
 * @param {StreamEvent} event
 * @param {any} error
 * @param {{cursor: string}} progress
 */
function failureOfStream(event, error, progress) {
  const isOfConnection = event.id === "" || event.id === progress.cursor;
  const status = error.http_status_code ?? 0;
  return failureFrom(typeof error === "string" ? { message: error } : error, { status, isTransient: isOfConnection && status >= 500 });
}

/**
 * @param {string} data
 * @returns {any}
 */
function parseFrame(data) {
  try {
    return JSON.parse(data);
  } catch (cause) {
    throw new HeadraceError("BAD_ANSWER", "A frame of the stream is not JSON.", { cause });
  }
}

const streamPath = (/** @type {string} */ id) => `/v1/streams/${encodeURIComponent(id)}`;

/** @returns {Progress} */
function newProgress(id = "") {
  return { id, cursor: "", text: "", finishReason: null, stats: null };
}

/** Unguessable is not needed, only unlike any other; `randomUUID` is there on https alone. */
function newKey() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// EventSource -------------------------------------------------------------------------------------

/**
 * @param {Gateways} gateways
 * @param {string} id
 * @param {Options} options
 * @returns {Promise<string>}
 */
async function tokenUrl(gateways, id, options) {
  const path = `${gateways.current}${streamPath(id)}/token`;
  const { response, close } = await connect(options, path, { method: "POST" });
  const { url } = await response.json().finally(close);
  return gateways.current + url;
}

/**
 * Applies an EventSource's events; true when the stream has ended, false when it was given up.
 *
 * @param {URL} url
 * @param {Progress} progress
 * @param {Options} options
 * @returns {Promise<boolean>}
 */
async function listen(url, progress, options) {
  const source = new EventSource(url);
  let stop = () => {};
  try {
    const hasEnded = await new Promise((resolve, reject) => {
      stop = () => reject(options.signal?.reason);
      const onEvent = (/** @type {MessageEvent<string>} */ { type, data, lastEventId }) => {
        try {
          if (take({ id: lastEventId, type, data }, progress, options)) resolve(true);
        } catch (error) {
          reject(error);
        }
      };
      source.addEventListener("message", onEvent);
      source.addEventListener("queue", onEvent);
      source.addEventListener("open", () =>
        options.onState?.(progress.text ? "streaming" : "waiting", progress),
      );
      source.addEventListener("error", () => {
        if (source.readyState === EventSource.CLOSED) resolve(false);
        else options.onState?.("reconnecting", progress);
      });
      options.signal?.addEventListener("abort", stop);
      if (options.signal?.aborted) stop();
    });
    return hasEnded || (await isOver(url, progress, options));
  } finally {
    options.signal?.removeEventListener("abort", stop);
    source.close();
  }
}

/**
 * An EventSource that was refused does not say why: the end (204) looks like any error.
 *
 * @param {URL} url
 * @param {Progress} progress
 * @param {Options} options
 */
async function isOver(url, progress, options) {
  if (progress.cursor) url.searchParams.set("after", progress.cursor);
  const { response, close } = await connect({ ...options, headers: {} }, url.href, {
    method: "HEAD",
  });
  close();
  return response.status === 204;
}

// Connections -------------------------------------------------------------------------------------

/** The gateways that may be asked, and which one is. Any of them knows every stream. */
class Gateways {
  /** @param {string|string[]} [baseUrl] */
  constructor(baseUrl = "") {
    this.urls = Array.isArray(baseUrl) ? baseUrl : [baseUrl];
    this.turned = 0;
  }

  get current() {
    return this.urls[this.turned % this.urls.length] ?? "";
  }

  /** The next one, as this one is out of reach. */
  turn() {
    this.turned++;
  }
}

/**
 * Makes a call again while it fails for a moment, each time at the next gateway.
 *
 * @template T
 * @param {Gateways} gateways
 * @param {AbortSignal|undefined} signal
 * @param {string[]|null} codes  Failures that may be tried again; null: all that may pass.
 * @param {() => Promise<T>} call
 * @returns {Promise<T>}
 */
async function persist(gateways, signal, codes, call) {
  for (let attempt = 1; ; attempt++) {
    try {
      return await call();
    } catch (error) {
      const mayPass = error instanceof HeadraceError && error.isTransient;
      if (!mayPass || attempt === ATTEMPTS) throw error;
      if (codes && !codes.includes(error.code)) throw error;
      gateways.turn();
      await pause(attempt, error.retryAfterMs, signal);
    }
  }
}

/**
 * One call: an answer of status 2xx, its body as chunks, and `close`. Everything else is thrown as
 * a HeadraceError, except the caller's own abort, which keeps its reason.
 *
 * @param {Pick<Options, "headers"|"signal"|"silenceMs">} options
 * @param {string} url
 * @param {RequestInit & {headers?: Record<string, string>}} init
 * @returns {Promise<Connection>}
 */
async function connect({ headers, signal, silenceMs = SILENCE_MS }, url, init) {
  const abort = new AbortController();
  /** @type {ReturnType<typeof setTimeout>|undefined} */
  let timer;
  const heard = () => {
    clearTimeout(timer);
    timer = setTimeout(() => abort.abort(), silenceMs);
  };
  const close = () => {
    clearTimeout(timer);
    abort.abort();
  };
  const lost = (/** @type {unknown} */ cause) => {
    close();
    if (signal?.aborted) return signal.reason;
    return brokenOff(cause);
  };
  heard();
  const response = await fetch(url, {
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

/** @param {Response} response */
function isEventStream(response) {
  return response.headers.get("content-type")?.startsWith("text/event-stream") ?? false;
}

/** @param {unknown} [cause] */
function brokenOff(cause) {
  const message = "The connection to the gateway broke, or never came about.";
  return new HeadraceError("CONNECTION_LOST", message, { isTransient: true, cause });
}

/** @param {Response} response */
async function failureOf(response) {
  const { status, headers } = response;
  const body = await response.json().catch(() => ({}));
  const wait = headers.get("retry-after-ms") ?? Number(headers.get("retry-after")) * 1000;
  // TGI's routes write the code beside the message, OpenAI's inside of `error`.
  const error = typeof body?.error === "string" ? { code: body.code, message: body.error } : body?.error;
  return failureFrom(error ?? {}, {
    status,
    isTransient: status >= 500 || status === 429 || status === 408,
    retryAfterMs: Number(wait) || null,
  });
}

/**
 * @param {{code?: string, message?: string}} error
 * @param {{status: number, isTransient: boolean, retryAfterMs?: number|null}} detail
 */
function failureFrom({ code, message }, detail) {
  const name = String(code ?? `HTTP_${detail.status}`).toUpperCase();
  return new HeadraceError(name, message ?? "The gateway gave no reason.", detail);
}

/**
 * Waits longer after each failure, each client differently; ends early when the network is back.
 *
 * @param {number} failures
 * @param {number|null} [retryAfterMs]
 * @param {AbortSignal} [signal]
 * @returns {Promise<void>}
 */
function pause(failures, retryAfterMs, signal) {
  const longest = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** (failures - 1));
  const jittered = longest * (0.5 + Math.random() / 2);
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      globalThis.removeEventListener?.("online", end); // browsers have it, Node has not
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
 * @returns {AsyncGenerator<StreamEvent>}
 */
export async function* parseEvents(chunks) {
  let id = "";
  let type = "";
  /** @type {string[]} */
  let data = [];
  for await (const line of linesOf(chunks)) {
    if (line === "") {
      if (data.length) yield { id, type: type || "message", data: data.join("\n") };
      type = "";
      data = [];
      continue;
    }
    const [, field, value] = /^([^:]*)(?:: ?(.*))?$/s.exec(line) ?? [];
    if (field === "data") data.push(value ?? "");
    else if (field === "event") type = value ?? "";
    else if (field === "id" && !value?.includes("\0")) id = value ?? "";
  }
}

/** @param {AsyncIterable<Uint8Array>} chunks */
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
    rest = lines.pop() ?? "";
    yield* lines;
  }
}
