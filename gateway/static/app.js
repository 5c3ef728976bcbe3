// The chat page: a form and a list become a conversation over `headrace.js`.
//
// A turn is plain JSON, as it is stored:
//   question  {role: "user", text}
//   answer    {role: "assistant", progress, isOpen, wasStopped, failure}
// An open answer is read on after a reload, from the cursor that was stored together with its text.

import { cancel, HeadraceError, resume, streamChat } from "./headrace.js";
import { $, announce, authorization, BASE_URL } from "./page.js";
import { openStore } from "./store.js";
import { AnswerView, newQuestion } from "./turn.js";

/** How long a generation goes on while nobody reads it: a reload, a tunnel, a walk to the router. */
const DISCONNECT_GRACE_S = 300;
/** After a stop the stream ends by itself; if that takes longer, the page stops listening. */
const STOP_WAIT_MS = 3000;
const NEAR_BOTTOM_PX = 80;
const DEFAULTS = { temperature: 0.7, maxTokens: 512, systemPrompt: "" };

const store = await openStore();
let turns = store.loadTurns();
/** The answer that is being read: {turn, view, abort}; null when none is. */
let current = null;
let model = "";
let followsBottom = true;

start();

function start() {
  store.onRefused = () => announce("This browser keeps nothing: a reload loses the conversation.");
  connectControls();
  connectSettings();
  const last = turns.map(show).at(-1);
  showConversation();
  scrollToBottom();
  if (matchMedia("(pointer: fine)").matches) $("prompt").focus(); // elsewhere a keyboard pops up
  loadModel();
  if (turns.at(-1)?.isOpen) goOn(turns.at(-1), last);
}

// Asking and answering ----------------------------------------------------------------------------

function ask(text) {
  const question = { role: "user", text };
  turns.push(question);
  show(question);
  answer();
}

/** Has the model answer the conversation so far. */
function answer() {
  const messages = messagesForModel();
  const turn = { role: "assistant", progress: null, isOpen: true, wasStopped: false, failure: null };
  turns.push(turn);
  follow(turn, show(turn), async (options) => {
    const { temperature, maxTokens } = settings();
    const body = { model: await loadModel(), messages, temperature, max_tokens: maxTokens };
    const headers = { "x-headrace-disconnect": String(DISCONNECT_GRACE_S), ...authorization() };
    return streamChat({ ...options, body, headers });
  });
}

/** Reads an answer on that was open when the page was left, or whose gateway was out of reach. */
function goOn(turn, view) {
  turn.isOpen = true;
  turn.failure = null;
  view.isReturning = true;
  follow(turn, view, async (options) => {
    if (!turn.progress?.id) throw new HeadraceError("NOT_SENT", "");
    return resume({ ...options, progress: turn.progress, headers: authorization() });
  });
}

/** Shows an answer while `call` reads it, to whatever end. */
async function follow(turn, view, call) {
  const abort = new AbortController();
  current = { turn, view, abort };
  followsBottom = true;
  showConversation();
  store.saveTurns(turns);
  if (turn.wasStopped) endSoon(current); // the page was left before the gateway could be told
  const onState = (state, progress) => {
    if (abort.signal.aborted) return;
    const hadId = Boolean(turn.progress?.id);
    turn.progress = progress;
    if (turn.wasStopped && !hadId && progress.id) tellGatewayToStop(turn, view);
    showState(turn, view, state);
    store.saveTurns(turns);
  };
  const onText = (_piece, progress) => {
    if (abort.signal.aborted) return;
    turn.progress = progress;
    view.showTextSoon();
    store.saveTurnsSoon(turns);
  };
  const onPlace = (place) => view.showPlace(place);
  const { signal } = abort;
  try {
    turn.progress = await call({ baseUrl: BASE_URL, onState, onText, onPlace, signal });
  } catch (error) {
    if (!abort.signal.aborted) turn.failure = failureFrom(error, turn);
  }
  if (current?.turn !== turn) return; // a new chat has begun meanwhile
  turn.isOpen = false;
  current = null;
  store.saveTurns(turns);
  view.showEnd();
  showConversation();
  if (turn.failure?.code === "INVALID_API_KEY") askForKey();
}

function showState(turn, view, state) {
  const isReturning = view.isReturning && state === "reconnecting";
  view.isReturning = isReturning;
  view.showState(turn.wasStopped ? "stopping" : isReturning ? "resuming" : state);
  $("dock").dataset.state = state;
}

function failureFrom(error, turn) {
  const { code, message, retryAfterMs } = error;
  if (!(error instanceof HeadraceError)) {
    console.error(error);
    return { code: "PAGE_ERROR", message };
  }
  const canResume = code === "CONNECTION_LOST" && Boolean(turn.progress?.id);
  return { code, message, retryAfterMs, canResume };
}

function stop() {
  if (!current || current.turn.wasStopped) return;
  current.turn.wasStopped = true;
  current.view.showState("stopping");
  store.saveTurns(turns);
  endSoon(current);
}

function endSoon({ turn, view, abort }) {
  if (turn.progress?.id) tellGatewayToStop(turn, view);
  setTimeout(() => abort.abort(), STOP_WAIT_MS);
}

async function tellGatewayToStop(turn, view) {
  try {
    await cancel({ baseUrl: BASE_URL, id: turn.progress.id, headers: authorization() });
  } catch {
    turn.failure = { code: "STOP_NOT_SENT", message: "" };
    store.saveTurns(turns);
    if (!turn.isOpen) view.showEnd();
  }
}

function tryAgain(turn, view) {
  if (current || turn !== turns.at(-1)) return;
  if (turn.failure?.canResume) {
    goOn(turn, view);
  } else {
    view.item.remove();
    turns.pop();
    answer();
  }
  $("prompt").focus();
}

function startNewChat() {
  if (current) {
    const { turn, view, abort } = current;
    if (turn.progress?.id) tellGatewayToStop(turn, view);
    abort.abort();
    current = null;
  }
  turns = [];
  store.saveTurns(turns);
  $("conversation").replaceChildren();
  $("announcer").replaceChildren();
  showConversation();
  $("prompt").focus();
}

/** What was said so far; answers that never came are left out. */
function messagesForModel() {
  const { systemPrompt } = settings();
  const said = turns.map(({ role, text, progress }) => ({
    role,
    content: role === "user" ? text : (progress?.text ?? ""),
  }));
  return [{ role: "system", content: systemPrompt }, ...said].filter(({ content }) => content);
}

/** The model that /v1/models names first; "" while the gateway does not say. */
async function loadModel() {
  if (model) return model;
  try {
    const headers = authorization();
    const response = await fetch(`${BASE_URL}/v1/models`, { cache: "no-store", headers });
    const [first] = (await response.json()).data;
    model = first.id;
    if (first.max_model_len) $("max-tokens").max = first.max_model_len;
  } catch {
    return ""; // the gateway will say itself what is wrong when it is asked for an answer
  }
  $("model").textContent = model;
  return model;
}

// The page ----------------------------------------------------------------------------------------

/** Appends a turn to the page; returns the view of an answer, null for a question. */
function show(turn) {
  if (turn.role === "user") {
    $("conversation").append(newQuestion(turn));
    return null;
  }
  const view = new AnswerView(turn, {
    announce,
    onGrowth: () => followsBottom && scrollToBottom(),
    onRetry: () => tryAgain(turn, view),
  });
  $("conversation").append(view.item);
  return view;
}

function showConversation() {
  const isBusy = current !== null;
  const focused = document.activeElement;
  $("welcome").hidden = turns.length > 0;
  $("new-chat").hidden = turns.length === 0;
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (!isBusy) $("dock").dataset.state = "idle";
  showLatestButton();
  // A button that disappears must not take the keyboard's place with it.
  if (focused === $("send") || focused === $("stop")) $("prompt").focus();
}

function connectControls() {
  const prompt = $("prompt");
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  prompt.addEventListener("keydown", (event) => {
    // During composition Enter chooses a candidate of the input method.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  prompt.addEventListener("input", fitPrompt);
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !event.isComposing) stop();
  });
  $("stop").addEventListener("click", stop);
  $("new-chat").addEventListener("click", startNewChat);
  $("examples").addEventListener("click", (event) => {
    if (!event.target.matches("button")) return;
    ask(event.target.textContent);
    prompt.focus();
  });
  $("latest").addEventListener("click", () => scrollToBottom());
  addEventListener("scroll", noteScroll, { passive: true });
  addEventListener("resize", () => followsBottom && scrollToBottom());
}

function send() {
  const text = $("prompt").value.trim();
  if (!text || current) return;
  if (!$("max-tokens").checkValidity()) {
    $("settings").open = true; // what is hidden cannot say what is wrong with it
    $("max-tokens").reportValidity();
    return;
  }
  $("prompt").value = "";
  fitPrompt();
  ask(text);
}

/** The field grows with its text; the style sheet limits how far. */
function fitPrompt() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function noteScroll() {
  const { scrollTop, scrollHeight, clientHeight } = document.documentElement;
  followsBottom = scrollHeight - scrollTop - clientHeight < NEAR_BOTTOM_PX;
  showLatestButton();
}

function showLatestButton() {
  $("latest").hidden = followsBottom || turns.length === 0;
}

function scrollToBottom() {
  scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
}

// Settings ----------------------------------------------------------------------------------------

function connectSettings() {
  const chosen = { ...DEFAULTS, ...store.loadSettings() };
  $("temperature").value = chosen.temperature;
  $("max-tokens").value = chosen.maxTokens;
  $("system-prompt").value = chosen.systemPrompt;
  $("api-key").value = store.loadApiKey();
  const showTemperature = () => {
    $("temperature-shown").textContent = settings().temperature.toFixed(1);
  };
  showTemperature();
  $("settings").addEventListener("input", () => {
    showTemperature();
    store.saveSettings(settings());
  });
  $("api-key").addEventListener("change", () => {
    store.saveApiKey($("api-key").value.trim());
    loadModel();
  });
}

/** Opens the settings at the field that is empty or wrong. */
function askForKey() {
  $("settings").open = true;
  $("api-key").focus();
}

function settings() {
  return {
    temperature: Number($("temperature").value),
    maxTokens: Number($("max-tokens").value) || DEFAULTS.maxTokens,
    systemPrompt: $("system-prompt").value.trim(),
  };
}
