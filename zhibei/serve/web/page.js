// The page put together: what buttons do, and answers as they come.

import { Controls } from "./controls.js";
import { asMessages, asShareGpt, download, read } from "./files.js";
import { Server, takeKey } from "./server.js";
import { Talk } from "./talk.js";
import { Turns } from "./turns.js";
import { LANGUAGES, speak, spoken, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const THEMES = ["Auto", "Light", "Dark"];
const talk = new Talk();
const controls = new Controls($("controls"));
const server = new Server(takeKey());
const acts = { again, rewrite, leaveOut };
const turns = new Turns($("talk"), talk, acts);
let models = [];
let isComparing = false;
let asking = null; // what stops the answers under way
let numAsked = 0;

// --- asking ---

function chosenModels() {
  const first = $("model-a").value;
  return isComparing ? [first, $("model-b").value] : [first];
}

async function ask(question) {
  await answer(talk.ask(question, chosenModels()));
}

async function rewrite(number, question) {
  if (!asking) await answer(talk.rewrite(number, question, chosenModels()));
}

async function again(number) {
  if (!asking) await rewrite(number, talk.turns[number].question);
}

async function leaveOut(number) {
  talk.leaveOutOldest();
  await again(number);
}

async function answer(number) {
  const options = controls.values();
  if (!options) {
    talk.turns.length = number;
    return;
  }
  // A fixed seed still says something else when it is asked again, and the same in the same session.
  if (options.seed !== undefined) options.seed += numAsked;
  numAsked += 1;
  tell("");
  asking = new AbortController();
  show();
  await Promise.all(talk.turns[number].answers.map((_, side) => answerOne(number, side, options)));
  asking = null;
  show();
  $("message").focus();
}

async function answerOne(number, side, options) {
  const found = talk.turns[number].answers[side];
  const body = { model: found.model, messages: talk.messages(number, side), ...options };
  const begun = performance.now();
  const hear = (text) => {
    found.first ??= (performance.now() - begun) / 1000;
    found.text += found.text ? text : text.trimStart();
    turns.update(number, side, found);
  };
  try {
    const { finish, usage } = await server.answer(body, hear, asking.signal);
    const seconds = (performance.now() - begun) / 1000;
    Object.assign(found, { finish, first: found.first ?? seconds, tokens: usage.completion_tokens });
    found.speed = usage.completion_tokens / Math.max(seconds, 1e-6);
    found.used = usage.total_tokens;
  } catch (error) {
    found.finish = error.name === "AbortError" ? "stopped" : "failed";
    if (found.finish === "failed") describe(found, error, number);
  }
  turns.update(number, side, found);
}

function describe(found, error, number) {
  // fetch throws a TypeError where it reaches nobody.
  const code = error instanceof TypeError ? "unreachable" : error.code;
  const canLeaveOut = code === "context_length_exceeded" && number > talk.firstSent;
  found.error = { code, message: error.message, canLeaveOut };
}

// --- the page ---

function show() {
  const model = models.find((one) => one.id === $("model-a").value);
  turns.show(model ? [word("empty", { template: model.template }), ...model.notes] : []);
  $("send").hidden = Boolean(asking);
  $("stop").hidden = !asking;
  $("second").hidden = !isComparing;
  $("compare").setAttribute("aria-pressed", String(isComparing));
  $("report").hidden = !model?.has_report;
  $("report").href = `report?model=${encodeURIComponent(model?.id ?? "")}`;
  const used = talk.turns.at(-1)?.answers[0]?.used;
  $("room").textContent = used && model?.context_tokens ? word("room", { used, all: model.context_tokens }) : "";
}

function tell(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function setLanguage(chosen) {
  localStorage.setItem("language", chosen);
  speak(chosen);
  const other = chosen === "en" ? "zh" : "en";
  $("language").textContent = LANGUAGES[other];
  $("language").lang = other;
  $("message").placeholder = word("placeholder");
  setTheme(localStorage.getItem("theme") ?? "Auto");
  controls.show();
  show();
}

function setTheme(chosen) {
  localStorage.setItem("theme", chosen);
  document.documentElement.dataset.theme = chosen.toLowerCase();
  $("theme").textContent = word(`theme${chosen}`);
}

function fillModels() {
  for (const id of ["model-a", "model-b"]) {
    $(id).replaceChildren(...models.map((model) => new Option(model.id, model.id)));
  }
  if (models.length > 1) $("model-b").value = models[1].id;
  $("compare").disabled = models.length < 2;
}

function openPanel(isOpen) {
  $("panel").hidden = !isOpen;
  $("panel-switch").setAttribute("aria-expanded", String(isOpen));
}

function send(event) {
  event?.preventDefault();
  const text = $("message").value;
  if (!text.trim() || asking) return;
  $("message").value = "";
  fit();
  ask(text);
}

function fit() {
  $("message").style.height = "auto";
  $("message").style.height = `${Math.min($("message").scrollHeight + 2, 200)}px`;
}

async function openFile() {
  const [file] = $("import-file").files;
  $("import-file").value = "";
  if (!file || asking) return;
  try {
    talk.load(read(await file.text()));
    $("system").value = talk.system;
    tell("");
  } catch (error) {
    tell(word("badFile", { why: error.message }));
  }
  show();
}

function listen() {
  $("ask").addEventListener("submit", send);
  $("stop").addEventListener("click", () => asking?.abort());
  $("message").addEventListener("input", fit);
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
    if (event.key === "ArrowUp" && !$("message").value && talk.turns.length && !asking) {
      event.preventDefault();
      turns.edit(talk.turns.length - 1);
    }
  });
  document.addEventListener("keydown", (event) => event.key === "Escape" && asking?.abort());
  $("system").addEventListener("input", () => (talk.system = $("system").value));
  $("fresh").addEventListener("click", () => {
    asking?.abort();
    talk.load({ system: talk.system, turns: [] });
    show();
    $("message").focus();
  });
  $("compare").addEventListener("click", () => {
    isComparing = !isComparing;
    show();
  });
  $("model-a").addEventListener("change", show);
  $("panel-switch").addEventListener("click", () => openPanel($("panel").hidden));
  $("language").addEventListener("click", () => setLanguage(spoken() === "en" ? "zh" : "en"));
  $("theme").addEventListener("click", () => {
    const now = THEMES.indexOf(localStorage.getItem("theme") ?? "Auto");
    setTheme(THEMES[(now + 1) % THEMES.length]);
  });
  $("export-messages").addEventListener("click", () => download("conversation.jsonl", asMessages(talk.conversations())));
  $("export-sharegpt").addEventListener("click", () =>
    download("conversation.sharegpt.json", asShareGpt(talk.conversations(), "conversation")),
  );
  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", openFile);
}

async function begin() {
  listen();
  openPanel(innerWidth > 900);
  const asked = navigator.language.startsWith("zh") ? "zh" : "en";
  setLanguage(localStorage.getItem("language") ?? asked);
  try {
    models = await server.models();
    fillModels();
  } catch (error) {
    tell(error.status === 401 ? word("noKey") : error.status ? error.message : word("unreachable"));
  }
  show();
}

begin();
