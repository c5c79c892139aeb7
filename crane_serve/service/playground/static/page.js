// The page: its controls, and what happens when they are used.

import { Chooser, MAX_MASKS } from "./chooser.js";
import { UNMASKED, compare } from "./completions.js";
import { bars, byId, cell, counted, element, figure, say, table, tokenSpans } from "./elements.js";
import { heatMap, taskNames } from "./evaluation.js";
import { putExamples } from "./examples.js";
import { Refused, get, score, useKey } from "./service.js";

const FIRST_MASKS = 2; // that are chosen before the visitor chooses

const masks = new Chooser("masks");
const parts = new Chooser("parts");
let evaluation = null;
let running = null; // what stops the completions under way

async function connect() {
  let listing, readiness;
  try {
    [listing, readiness] = await Promise.all([get("masks"), get("ready")]);
  } catch (error) {
    const isRefused = error instanceof Refused && error.status === 401;
    const isNew = isRefused && error.code === "missing_api_key";
    if (isRefused) byId("key-form").hidden = false;
    say("connection", isNew ? "This server asks for an API key." : error.message, !isNew);
    offer([], [UNMASKED]);
    return;
  }
  const names = listing.masks.map(({ name }) => name);
  const own = listing.masks.filter(({ name, language }) => name === `${listing.default_method}-${language}`);
  const usual = own.length ? own.map(({ name }) => name) : names;
  const broken = listing.invalid.length ? ` ${counted(listing.invalid.length, "mask file")} cannot be used.` : "";
  say("connection", `Connected to ${readiness.model}, with ${counted(names.length, "mask")}.${broken}`);
  offer(names, [UNMASKED, ...usual.slice(-FIRST_MASKS)]);
}

function offer(names, chosen) {
  masks.offer([UNMASKED, ...names]);
  masks.choose(chosen);
  parts.offer(names);
  parts.choose([]);
}

function tooMany() {
  return `At most ${MAX_MASKS} masks can be compared at once.`;
}

// What must be changed before the masks can be used, or "".
function problem() {
  if (!masks.names.length) return "Choose at least one mask, or none.";
  return masks.names.length > MAX_MASKS ? tooMany() : "";
}

function addExpression() {
  if (!parts.names.length) return say("built", "Choose at least one mask to join.", true);
  const factor = byId("factor").value.trim();
  const suffix = Number(factor) === 0 ? "" : `@${factor}`;
  const expression = parts.names.map((name) => name + suffix).join(",");
  if (masks.names.length >= MAX_MASKS) return say("built", tooMany(), true);
  masks.choose([...masks.names, expression]);
  return say("built", `Added ${expression}.`);
}

// Values go to the server as they are typed: what is wrong with one, it says.
function sampling() {
  const fields = { max_tokens: "max-tokens", temperature: "temperature", top_p: "top-p", repetition_penalty: "penalty", seed: "seed" };
  const values = Object.entries(fields).map(([name, id]) => [name, byId(id).value.trim()]);
  const given = values.filter(([, value]) => value !== "").map(([name, value]) => [name, Number(value)]);
  return { ...Object.fromEntries(given), positions: byId("positions").value.trim() || "all" };
}

async function generateAll() {
  const prompt = byId("prompt").value;
  const wrong = prompt.trim() ? problem() : "Write a prompt first, or pick one below.";
  if (wrong) return say("generated", wrong, true);
  running?.abort();
  const own = (running = new AbortController());
  say("generated", `Generating under ${counted(masks.names.length, "mask")} ...`);
  const total = masks.names.length;
  const { failed, stopped } = await compare(prompt, masks.names, sampling(), own.signal);
  if (running !== own) return undefined;
  running = null;
  if (failed) return say("generated", `${failed} of ${counted(total, "mask")} failed.`, true);
  return say("generated", stopped ? "Stopped." : `Done under ${counted(total, "mask")}.`);
}

async function computeLosses() {
  const text = byId("text").value;
  const wrong = text.trim() ? problem() : "Write a text first, or pick one below.";
  byId("losses").replaceChildren();
  if (wrong) return say("scored", wrong, true);
  say("scored", "Scoring ...");
  const answers = await Promise.all(
    masks.names.map(async (mask) => {
      try {
        return { mask, ...(await score({ text: [text], mask, return_tokens: true })).scores[0] };
      } catch (error) {
        return { mask, error: error.message };
      }
    }),
  );
  const failed = answers.filter(({ error }) => error).length;
  byId("losses").append(lossTable(answers), ...coloured(answers));
  const outcome = `Scored under ${counted(answers.length - failed, "mask")}.`;
  return say("scored", failed ? `${outcome} ${failed} failed.` : outcome, failed > 0);
}

function lossTable(answers) {
  const loss = ({ logprob, tokens }) => (tokens ? -logprob / tokens : NaN);
  const unmasked = answers.find(({ mask, error }) => mask === UNMASKED && !error);
  const change = (answer) => (!unmasked || answer.error || answer === unmasked ? NaN : loss(answer) - loss(unmasked));
  const full = Math.max(...answers.map(change).filter(Number.isFinite).map(Math.abs), 0) || 1;
  const rows = answers.map((answer) => {
    if (answer.error) return [cell(answer.mask), cell(answer.error), cell("-"), cell("-")];
    const tokens = cell(answer.tokens.toLocaleString("en"));
    const changed = cell(figure(change(answer), 3, true), { change: change(answer), full });
    return [cell(answer.mask), cell(figure(loss(answer), 3)), changed, tokens];
  });
  return table("Loss of the text", ["mask", "loss in nats per token", "change against none", "tokens"], rows);
}

// The text once for each mask, its tokens coloured by what the mask changed.
function coloured(answers) {
  const bases = answers.find(({ mask, error }) => mask === UNMASKED && !error)?.token_logprobs;
  if (!bases) return [];
  return answers
    .filter(({ mask, error, token_logprobs }) => mask !== UNMASKED && !error && token_logprobs.length === bases.length)
    .flatMap(({ mask, token_logprobs }) => [
      element("h3", {}, `Under ${mask}`),
      element("p", { class: "output", dir: "auto" }, ...tokenSpans(token_logprobs, bases)),
    ]);
}

async function showNeurons() {
  const names = [...new Set(masks.names.filter((name) => name !== UNMASKED).flatMap((name) => name.split(",")))]
    .map((name) => name.replace(/@.*$/, "").trim())
    .filter((name, index, all) => name && all.indexOf(name) === index);
  const wrong = problem() || (names.length ? "" : `Choose a mask; ${UNMASKED} has no neurons.`);
  byId("neurons").replaceChildren();
  if (wrong) return say("looked", wrong, true);
  say("looked", "Asking ...");
  let answers;
  try {
    answers = await Promise.all(names.map((name) => get(`masks/${encodeURIComponent(name)}/neurons`)));
  } catch (error) {
    return say("looked", error.message, true);
  }
  const found = [...new Map(answers.map((mask) => [mask.name, mask])).values()];
  byId("neurons").append(...whereNeuronsSit(found), overlaps(found));
  return say("looked", `${counted(found.length, "mask")} shown.`);
}

function whereNeuronsSit(found) {
  const counts = found.map(({ layers }) => layers.map(({ neurons }) => neurons.length));
  const most = Math.max(1, ...counts.flat());
  const about = `Neurons that each mask scales, from the first layer (left) to the last; all bars have one scale, up to ${most.toLocaleString("en")}.`;
  const pictures = found.map(({ name }, index) => {
    const summary = summaryOf(name, counts[index]);
    return element("li", {}, bars(counts[index], most, summary), element("p", {}, summary));
  });
  const layers = counts[0].map((_, layer) => String(layer));
  const rows = found.map(({ name }, index) => [
    cell(name),
    ...counts[index].map((count) => cell(count.toLocaleString("en"), { change: -count, full: most })),
  ]);
  return [
    element("h2", {}, "Where the neurons sit"),
    element("p", {}, about),
    element("ul", { class: "layers" }, ...pictures),
    element("details", {}, element("summary", {}, "In figures"), table("Neurons that each mask scales, by layer", ["mask", ...layers], rows)),
  ];
}

function summaryOf(name, counts) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  if (!total) return `${name} scales no neurons`;
  const most = counts.indexOf(Math.max(...counts));
  const used = counts.filter((count) => count > 0).length;
  return (
    `${name}: ${total.toLocaleString("en")} neurons in ${used} of ${counts.length} layers, ` +
    `most of them, ${counts[most].toLocaleString("en")}, in layer ${most}`
  );
}

function overlaps(found) {
  const places = found.map(({ layers }) => new Set(layers.flatMap(({ layer, neurons }) => neurons.map((neuron) => `${layer}.${neuron}`))));
  const rows = found.map(({ name }, first) => [
    cell(`${name} (${places[first].size.toLocaleString("en")})`),
    ...found.map((_, second) => {
      const shared = [...places[first]].filter((place) => places[second].has(place)).length;
      const either = places[first].size + places[second].size - shared;
      const index = either ? shared / either : 0;
      const detail = `${shared.toLocaleString("en")} shared`;
      return cell(figure(index, 3), { detail, change: first === second ? null : -index });
    }),
  ]);
  return element(
    "div",
    {},
    element("h2", {}, "Overlap"),
    element("p", {}, "Shared neurons as a share of those that are in either mask (Jaccard index), and how many they are."),
    table("Overlap of masks", ["mask (neurons)", ...found.map(({ name }) => name)], rows),
  );
}

async function showEvaluation() {
  try {
    evaluation = await get("evaluation");
  } catch (error) {
    byId("task-field").hidden = true;
    byId("matrix").replaceChildren();
    const isNone = error instanceof Refused && error.code === "no_evaluation";
    return say("evaluated", error.message, !isNone);
  }
  const chosen = byId("task").value;
  const names = taskNames(evaluation);
  byId("task").replaceChildren(...names.map((name) => element("option", {}, name)));
  byId("task").value = names.includes(chosen) ? chosen : names[0];
  byId("task-field").hidden = false;
  return showTask();
}

function showTask() {
  const name = byId("task").value;
  byId("matrix").replaceChildren(...heatMap(evaluation, taskNames(evaluation).indexOf(name)));
  say("evaluated", `Shown: ${name}.`);
}

// The keys of the ARIA pattern for tabs.
function putTabs() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  const open = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", String(tab === chosen));
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  tabs.forEach((tab, at) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const places = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: -1 };
      if (!(event.key in places)) return;
      event.preventDefault();
      const next = tabs.at(places[event.key] % tabs.length);
      open(next);
      next.focus();
    });
  });
}

function on(id, event, action) {
  byId(id).addEventListener(event, (happened) => {
    happened.preventDefault();
    action();
  });
}

putTabs();
putExamples(element);
on("key-form", "submit", () => {
  try {
    useKey(byId("api-key").value);
  } catch (error) {
    say("connection", error.message, true);
    return;
  }
  connect();
});
on("add", "click", addExpression);
on("generate", "click", generateAll);
on("stop", "click", () => running?.abort());
on("score", "click", computeLosses);
on("look", "click", showNeurons);
on("show", "click", showEvaluation);
on("task", "change", showTask);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generateAll();
});
connect();
