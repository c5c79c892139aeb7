// One prompt continued under several masks at once, each in a card of its own.

import { byId, element, tokenSpans, tokenTable, visible } from "./elements.js";
import { generate, languageOf, score } from "./service.js";

export const UNMASKED = "none";

const GROWTH = 24; // characters after which the language of a text is asked for again
const FINISHED = { stop: "the model ended it", length: "as many as were allowed" };
const NAMES = new Intl.DisplayNames(["en"], { type: "language", fallback: "none" });

function languageName(code) {
  if (code === null) return "not identified";
  const name = NAMES.of(code);
  return name ? `${name} (${code})` : code;
}

// The completion under one mask, and its card.
class Column {
  constructor(mask, prompt) {
    this.mask = mask;
    this.prompt = prompt;
    this.text = "";
    this.tokens = [];
    this.end = null;
    this.error = null;
    this.identified = 0;
    this.completion = element("span", { class: "completion" });
    this.facts = element("dl", { class: "facts" });
    this.card = element(
      "li",
      { class: "card", "data-mask": mask },
      element("h2", {}, mask),
      element("p", { class: "output", dir: "auto" }, element("span", { class: "prompt" }, visible(prompt)), this.completion),
      this.facts,
    );
    this.language = this.#fact("Language", "not identified", "language");
    this.state = this.#fact("State", "running");
  }

  #fact(name, text, kind = null) {
    const value = element("dd", { class: kind }, text);
    this.facts.append(element("div", {}, element("dt", {}, name), value));
    return value;
  }

  async run(sampling, signal) {
    const masked = this.mask === UNMASKED ? {} : { positions: sampling.positions };
    const { positions, ...others } = sampling;
    try {
      for await (const event of generate({ prompt: this.prompt, mask: this.mask, logprobs: 0, ...others, ...masked }, signal)) {
        if (event.outputs) this.end = event;
        else this.#add(event, signal);
      }
    } catch (error) {
      if (error.name !== "AbortError") this.error = error.message;
    }
    this.#finish();
    if (!this.text) return;
    await this.#identify(signal);
    if (this.end) await this.#compare(signal).catch(() => {}); // the completion is there without it
  }

  #add({ text, logprobs }, signal) {
    this.text += text;
    this.tokens.push(...(logprobs ?? []));
    this.completion.textContent = visible(this.text);
    if (this.text.length - this.identified >= GROWTH) this.#identify(signal);
  }

  #finish() {
    if (this.error !== null) {
      this.card.classList.add("error");
      this.facts.before(element("p", { class: "problem" }, this.error));
    }
    if (!this.end) {
      this.state.textContent = this.error === null ? "stopped" : "failed";
      return;
    }
    this.state.parentElement.remove();
    const { outputs: [output], usage, mask } = this.end;
    this.#fact("Tokens", [usage.completion_tokens, FINISHED[output.finish_reason] ?? output.finish_reason].join(", "));
    if (mask) {
      this.#fact("Neurons", mask.neurons.toLocaleString("en"));
      this.#fact("Digest", "").append(element("code", {}, mask.digest.slice(0, 12)));
    }
  }

  async #identify(signal) {
    this.identified = this.text.length;
    let code;
    try {
      code = await languageOf(this.text, signal);
    } catch {
      return; // of the next piece, or of nothing
    }
    this.language.textContent = languageName(code);
    if (code) this.completion.lang = code;
    else this.completion.removeAttribute("lang");
  }

  // Ask for the same tokens without a mask. They can be compared only where the text alone splits into the same ones.
  async #compare(signal) {
    const body = { context: this.prompt, continuations: [this.text], mask: UNMASKED, join: "length", return_tokens: true };
    const bases = (await score(body, signal)).scores[0].token_logprobs;
    if (bases.length > this.tokens.length || bases.some(({ token_id }, index) => token_id !== this.tokens[index].token_id)) return;
    const tokens = bases.map(({ token }, index) => ({ token, logprob: this.tokens[index].logprob }));
    const without = this.mask === UNMASKED ? null : bases;
    this.completion.replaceChildren(...tokenSpans(tokens, without));
    this.card.append(tokenTable(`Token probabilities under ${this.mask}`, tokens, without));
    if (without) byId("legend").hidden = false;
  }
}

// Continue `prompt` under each of `masks`. Answers how many failed, and how many were stopped.
export async function compare(prompt, masks, sampling, signal) {
  const columns = masks.map((mask) => new Column(mask, prompt));
  byId("legend").hidden = true;
  byId("completions").replaceChildren(...columns.map(({ card }) => card));
  await Promise.all(columns.map((column) => column.run(sampling, signal)));
  return {
    failed: columns.filter(({ error }) => error !== null).length,
    stopped: columns.filter(({ error, end }) => error === null && !end).length,
  };
}
