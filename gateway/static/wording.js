// What the page says in words: measurements, ends and failures.

const FAILURES = {
  NOT_SENT: "This page was left before the gateway had taken the message.",
  CONNECTION_LOST: "The gateway cannot be reached.",
  BAD_ANSWER: "What answered is not a Headrace gateway, or one that this page does not understand.",
  STOP_NOT_SENT:
    "Stopped here, but the gateway could not be told. It goes on for a few minutes at most.",
  NO_WORKERS: "No worker for this model is running at the moment.",
  QUEUE_FULL: "More people are asking than can be answered in time.",
  QUEUE_TIMEOUT: "The message waited in the queue for too long and was never started.",
  GENERATION_TIMEOUT: "The answer took longer than allowed. This is what there is of it.",
  CONTEXT_LENGTH_EXCEEDED:
    "The conversation and the longest answer together are more than the model can hold. " +
    "Lower the longest answer in the settings, or begin a new chat.",
  STREAM_EXPIRED: "This answer is no longer kept on the server. Above is what had arrived.",
  NOT_FOUND: "The server does not know this answer any more. Above is what had arrived.",
  STREAM_DIVERGED:
    "The rest of this answer was lost with the machine that made it, and cannot be made the same " +
    "again.",
  MODEL_VERSION_GONE: "The version of the model that began this answer is no longer running.",
  POISON_REQUEST: "Workers failed on this message again and again, so it was set aside.",
  BODY_TOO_LARGE: "The conversation is too large to be sent.",
  BROKER_UNAVAILABLE: "The gateway has lost its queue for the moment.",
  BROKER_FULL: "The server's queue has no memory left.",
  DRAINING: "This gateway is being stopped.",
  INVALID_API_KEY: "This gateway asks for an API key, and has not been given a valid one.",
  PERMISSION_ERROR: "This API key may not do that.",
  PAGE_ERROR: "This page made a mistake. The browser's console says more.",
};

const BATCH_STATES = {
  validating: "Checking the file",
  in_progress: "Running",
  finalizing: "Writing the results",
  completed: "Done",
  failed: "Refused",
  expired: "Expired",
  cancelling: "Cancelling",
  cancelled: "Cancelled",
};

const ENDS = {
  length: "Cut off at the longest answer that the settings allow.",
  cancelled: "Ended early: it was cancelled, or nobody was reading it for too long.",
};

/** Why a turn has no (whole) answer; the gateway's own sentence where the page knows no better. */
export function describeFailure({ code, message, retryAfterMs }) {
  const sentence = FAILURES[code] ?? message ?? "";
  // Elsewhere the wait is a guess, and a promise that does not hold is worse than none.
  if (code !== "QUEUE_FULL" || !retryAfterMs) return sentence;
  return `${sentence} There should be room in about ${Math.ceil(retryAfterMs / 1000)} s.`;
}

/**
 * What is worth saying about a place in the queue; "" where there is nobody ahead.
 *
 * @param {import("./headrace.js").Place} place
 */
export function describePlace({ isWaiting, position, estimatedWait }) {
  if (!isWaiting) return "Reading the message…";
  if (position === 0) return "";
  const wait = estimatedWait === null ? "" : `, about ${Math.ceil(estimatedWait)} s`;
  return `Waiting in the queue, ${position} ahead${wait}…`;
}

/** The state of a batch, in a word or two. */
export function describeBatchState(status) {
  return BATCH_STATES[status] ?? status;
}

/**
 * How far a batch is.
 *
 * @param {any} batch  As the API shows it.
 * @param {number} rate  In lines per second; 0: not known.
 */
export function describeBatch({ status, request_counts: counts, created_at: createdAt }, rate) {
  const { total, completed, failed } = counts;
  const finished = completed + failed;
  const created = new Date(createdAt * 1000).toLocaleString([], {
    dateStyle: "medium",
    timeStyle: "short",
  });
  const parts = [];
  if (total) parts.push(`${number(finished)} of ${number(total)} lines`);
  if (failed) parts.push(`${number(failed)} failed`);
  if (status === "in_progress" && rate > 0) {
    parts.push(`${rate.toFixed(rate < 10 ? 1 : 0)} lines/s`, `${duration((total - finished) / rate)} left`);
  }
  return [...parts, created].join(" · ");
}

/** How a batch ended. */
export function describeBatchEnd({ status, request_counts: counts }) {
  const { total, completed, failed } = counts;
  const state = describeBatchState(status).toLowerCase();
  if (status === "failed") return `${state}.`;
  return `${state}, ${number(completed)} of ${number(total)} lines answered, ${number(failed)} failed.`;
}

/** What is worth saying about how an answer ended; "" when it just ended. */
export function describeEnd({ progress, wasStopped, failure }) {
  if (failure) return "";
  if (wasStopped) return "Stopped.";
  return ENDS[progress?.finishReason] ?? "";
}

/**
 * @param {import("./headrace.js").Stats} stats
 * @returns {{name: string, value: string, kind: string}[]}
 */
export function describeStats(stats) {
  const figures = [
    { name: "Queue time", value: seconds(stats.queue_time), kind: "time" },
    { name: "Time to first token", value: seconds(stats.time_to_first_token), kind: "time" },
    { name: "Tokens per second", value: rate(stats.tokens_per_second), kind: "rate" },
    { name: "Model version", value: stats.model_version || "–", kind: "version" },
  ];
  if (stats.attempts > 1) {
    figures.push({
      name: `Attempts: ${stats.attempts}`,
      value: "Continued by another worker",
      kind: "attempts",
    });
  }
  return figures;
}

export function number(value) {
  return value.toLocaleString("en");
}

function duration(seconds) {
  if (seconds < 90) return `about ${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `about ${minutes} min` : `about ${Math.round(minutes / 60)} h`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return `${value.toFixed(value < 10 ? 2 : 0)} s`;
}

function rate(value) {
  return value ? value.toFixed(value < 100 ? 1 : 0) : "–";
}
