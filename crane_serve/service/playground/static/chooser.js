// A field for several names: those chosen stand before it, each with a button that takes it away.

import { byId, element } from "./elements.js";

export const MAX_MASKS = 16;

export class Chooser {
  // id: of the element that holds the label and a .chooser; its field is called ID-input, its suggestions ID-names.
  constructor(id) {
    this.names = [];
    this.list = element("ul", { class: "chosen" });
    this.suggestions = element("datalist", { id: `${id}-names` });
    this.field = element("input", {
      id: `${id}-input`,
      list: `${id}-names`,
      autocomplete: "off",
      autocapitalize: "none",
      spellcheck: "false",
      "aria-describedby": byId(`${id}-hint`) ? `${id}-hint` : null,
    });
    byId(id).querySelector(".chooser").append(this.list, this.field, this.suggestions);
    this.field.addEventListener("keydown", (event) => this.#onKey(event));
    this.field.addEventListener("change", () => this.#take());
    this.field.addEventListener("input", (event) => {
      if (event.inputType === "insertReplacementText" || !event.inputType) this.#take(true); // picked from the list
    });
  }

  offer(names) {
    this.offered = new Set(names);
    this.suggestions.replaceChildren(...names.map((name) => element("option", { value: name })));
  }

  choose(names) {
    this.names = [...new Set(names)];
    this.list.replaceChildren(...this.names.map((name) => this.#token(name)));
  }

  #token(name) {
    const remove = element("button", { type: "button", "aria-label": `Remove ${name}` }, "×");
    remove.addEventListener("click", () => {
      this.choose(this.names.filter((one) => one !== name));
      this.field.focus();
    });
    return element("li", { class: "token" }, element("span", {}, name), remove);
  }

  #take(onlyOffered = false) {
    const name = this.field.value.trim();
    if (!name || (onlyOffered && !this.offered?.has(name))) return;
    this.field.value = "";
    this.choose([...this.names, name]);
  }

  #onKey(event) {
    if (event.key === "Enter") {
      event.preventDefault();
      this.#take();
    } else if (event.key === "Backspace" && !this.field.value) {
      this.choose(this.names.slice(0, -1));
    }
  }
}
