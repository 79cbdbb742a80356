// The page: settings, a run, and the player that walks through what was recorded of it.

import { Card } from "./card.js";
import { copy } from "./clipboard.js";
import { ServerError, describe, generate } from "./stream.js";
import { fromLink, gaps, noiseAgain, toLink } from "./template.js";

const $ = (id) => document.getElementById(id);
const SAVED = ["template", "steps", "halt", "threshold", "seed", "samples", "solver", "grid",
  "noise_scale", "temperature", "top_k", "guidance", "refine", "freeze"];
const THRESHOLDS = {
  patience: ["Switchless steps", 25], entropy: ["Nats a token", 0.1], kl: ["Nats a token", 0.001],
};
const PACE = 20; // steps a second when played

let model = null;
let cards = [];
let running = null; // AbortController of the run
let at = 0; // the step we look at
let following = true; // we look at the newest step
let timer = null;

// ---- settings

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? null : Number(value);
}

function settings() {
  return Object.fromEntries(SAVED.map((id) => [id, $(id).type === "checkbox" ? $(id).checked : $(id).value]));
}

function restore(values) { // what a link leaves out is as the page has it at first, not as it happens to stand
  for (const id of SAVED) {
    const field = $(id);
    if (field.type === "checkbox") field.checked = id in values ? values[id] === "true" : field.defaultChecked;
    else if (id in values) field.value = values[id];
    else if (field.options) field.selectedIndex = Math.max(0, [...field.options].findIndex((o) => o.defaultSelected));
    else field.value = field.defaultValue;
  }
  showThreshold(false);
  count();
}

function body() {
  const halt = $("halt").value;
  const freeze = $("freeze").checked ? ":freeze" : "";
  const wanted = {
    template: $("template").value, steps: number("steps"), seed: number("seed") ?? 0,
    samples: number("samples") ?? 1, halt: halt === "none" ? "none" : `${halt}:${number("threshold")}${freeze}`,
    solver: $("solver").value || null, grid: $("grid").value || null,
    noise_scale: number("noise_scale"), temperature: number("temperature"),
    top_k: number("top_k"), guidance: number("guidance"), refine: number("refine"),
  };
  return Object.fromEntries(Object.entries(wanted).filter(([, v]) => v !== null));
}

function showThreshold(reset) {
  const found = THRESHOLDS[$("halt").value];
  $("threshold-label").hidden = !found;
  if (!found) return;
  $("threshold-label").querySelector("span").textContent = found[0];
  if (reset) $("threshold").value = found[1];
}

function count() {
  const tokens = gaps($("template").value);
  const most = model ? `, the model sees ${model.length} at once` : "";
  $("length").textContent = `${tokens} token${tokens === 1 ? "" : "s"} to write${most}`;
}

function complain(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// ---- a run

async function write() {
  if (running) return;
  complain("");
  stop();
  const control = new AbortController();
  running = control;
  busy(true);
  clearPicks();
  try {
    await generate(body(), $("key").value, control.signal, hear);
    $("status").textContent = cards.map((c) => `Seed ${c.seed}: ${c.state.textContent}. ${c.done?.text ?? ""}`).join(" ");
  } catch (error) {
    if (error.name === "AbortError") $("status").textContent = "Cancelled";
    else explain(error);
  } finally {
    running = null;
    busy(false);
    following = false;
    show();
  }
}

function explain(error) {
  if (!(error instanceof ServerError)) {
    complain("The server cannot be reached.");
    return;
  }
  const again = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  complain(error.message[0].toUpperCase() + error.message.slice(1) + (/[.!?]$/.test(error.message) ? "" : ".") + again);
  if (error.status === 401) {
    document.querySelector("details").open = true;
    $("key").focus();
  }
}

function hear(name, data) {
  if (name === "start") {
    cards = Array.from({ length: data.samples }, (_, i) => new Card($("card"), i, data, picked));
    $("cards").replaceChildren(...cards.map((c) => c.el));
    $("result").hidden = false;
    at = 0;
    following = true;
    if ($("result").getBoundingClientRect().top > innerHeight - 320) $("player").scrollIntoView({ block: "start" });
  } else if (name === "step") cards[data.sample].add(data);
  else if (name === "done") cards[data.sample].finish(data);
  else return;
  if (following) at = last();
  soon();
}

function busy(on) {
  $("go").disabled = on;
  $("go").textContent = on ? "Writing…" : "Write";
  $("cancel").hidden = !on;
}

// ---- the player

const last = () => Math.max(0, ...cards.map((c) => c.last));

let asked = false;
function soon() { // at most one drawing a frame of the screen
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => { asked = false; show(); });
}

function show() {
  const end = last();
  $("scrub").max = end;
  $("scrub").value = at;
  $("where").textContent = `step ${at} / ${end}`;
  const moving = timer !== null || (running && following);
  $("play").textContent = moving ? "❚❚ Pause" : "▶ Play";
  $("play").setAttribute("aria-label", moving ? "Pause" : "Play");
  for (const card of cards) card.show(at);
}

function go(step) {
  at = Math.min(last(), Math.max(0, step));
  show();
}

function stop() {
  clearInterval(timer);
  timer = null;
  following = false;
}

function play() {
  if (timer !== null || (running && following)) {
    stop();
    show();
    return;
  }
  if (at >= last()) at = running ? last() : 0;
  timer = setInterval(() => {
    if (at < last()) { go(at + 1); return; }
    stop();
    following = running !== null;
    show();
  }, 1000 / PACE);
  show();
}

function step(by) {
  stop();
  const known = [...new Set(cards.flatMap((c) => c.frames.map((f) => f.step)))].sort((a, b) => a - b);
  const to = by > 0 ? known.find((s) => s > at) : known.findLast((s) => s < at);
  go(to ?? at);
}

// ---- words to be noised again

let owner = null;

function picked(card) {
  if (owner && owner !== card) { const other = owner; owner = card; other.clear(); }
  owner = card;
  const n = card.picked.size;
  $("again").hidden = n === 0;
  $("again").querySelector("span").textContent = `${n} token${n === 1 ? "" : "s"}`;
}

function clearPicks() {
  for (const card of cards) card.clear();
  $("again").hidden = true;
}

function renoise() {
  if (!owner || running) return;
  $("template").value = noiseAgain(owner.done.tokens, owner.picked);
  $("seed").value = Number($("seed").value) + Number($("samples").value || 1);
  count();
  write();
}

// ---- wiring

$("composer").addEventListener("submit", (event) => { event.preventDefault(); write(); });
$("cancel").addEventListener("click", () => running?.abort());
$("template").addEventListener("input", count);
$("halt").addEventListener("change", () => showThreshold(true));
$("dice").addEventListener("click", () => { $("seed").value = Math.floor(Math.random() * 1e6); });
for (const button of document.querySelectorAll("[data-example]")) {
  button.addEventListener("click", () => { $("template").value = button.dataset.example; count(); $("template").focus(); });
}
document.querySelector("[data-gap]").addEventListener("click", (event) => {
  const field = $("template");
  field.setRangeText(`{${event.target.dataset.gap}}`, field.selectionStart, field.selectionEnd, "end");
  count();
  field.focus();
});
$("share").addEventListener("click", () => {
  history.replaceState(null, "", toLink(settings()));
  copy($("share"), location.href);
});
$("play").addEventListener("click", play);
$("back").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("scrub").addEventListener("input", () => { stop(); go(Number($("scrub").value)); });
$("renoise").addEventListener("click", renoise);
$("unpick").addEventListener("click", clearPicks);
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("theme", root.dataset.theme);
  show();
});
$("key").addEventListener("change", () => { sessionStorage.setItem("key", $("key").value); load(); });
addEventListener("resize", soon);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", soon);
addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); write(); }
  else if (event.key === "Escape") { if (running) running.abort(); else clearPicks(); }
  else if (event.target.closest("input, textarea, select, button, a, summary") || !cards.length) return;
  else if (event.key === " ") { event.preventDefault(); play(); }
  else if (event.key === "ArrowRight") step(1);
  else if (event.key === "ArrowLeft") step(-1);
});

async function load() {
  // before the first answer there was nothing to choose from: what the link says holds
  const grid = (model ? $("grid").value : fromLink(location.hash).grid) ?? "";
  try {
    model = await describe($("key").value);
    $("model").textContent = `${model.id} · ${(model.parameters / 1e6).toFixed(1)}M parameters`;
    document.title = `ddlm · ${model.id}`;
    $("grid").replaceChildren(new Option("model's", ""), ...model.grids.map((g) => new Option(g, g)));
    $("grid").value = model.grids.includes(grid) ? grid : "";
    Card.hot = Math.log(model.vocab_size);
    $("steps").max = model.limits.steps;
    $("steps").defaultValue = Math.min(model.defaults.steps, model.limits.steps); // shown until somebody sets another
    $("samples").max = Math.min(8, model.limits.samples);
    complain("");
  } catch (error) {
    explain(error);
  }
  count();
}

if (localStorage.getItem("theme")) document.documentElement.dataset.theme = localStorage.getItem("theme");
$("key").value = sessionStorage.getItem("key") ?? "";
await load();
if (location.hash.length > 1) restore(fromLink(location.hash));
addEventListener("hashchange", () => restore(fromLink(location.hash)));
