// What the page is made of: elements, status lines, tables, tokens, bars. All text is set as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const DIRECTIONS = /[\u202a-\u202e\u2066-\u2069]/g; // reorder what stands around them

export function element(tag, attributes = {}, ...children) {
  const made = tag === "svg" || tag === "rect" || tag === "title" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function byId(id) {
  return document.getElementById(id);
}

// With control characters as visible signs.
export function visible(text) {
  return text
    .replace(/[\0-\x08\x0b-\x1f]/g, (one) => String.fromCharCode(0x2400 + one.charCodeAt(0)))
    .replace(/\x7f/g, "\u2421")
    .replace(/[\x80-\x9f]/g, "\ufffd")
    .replace(DIRECTIONS, "\ufffd");
}

// A line that screen readers read out when it changes.
export function say(id, text, isError = false) {
  const old = byId(id).querySelector(".status");
  if (old.classList.contains("error") === isError) {
    old.textContent = text;
    return;
  }
  const role = isError ? "alert" : "status";
  old.replaceWith(element("p", { class: isError ? "status error" : "status", role }, text));
}

export function counted(number, noun) {
  return `${number} ${noun}${number === 1 ? "" : "s"}`;
}

// Rounded, without a minus sign before zeros; from a million on as a power of ten.
export function figure(value, digits, signed = false) {
  if (!Number.isFinite(value)) return "-";
  const rounded = Number(value.toFixed(digits)) + 0;
  const sign = signed && rounded >= 0 ? "+" : "";
  if (Math.abs(value) >= 1e6) return (signed && value >= 0 ? "+" : "") + value.toExponential(2);
  return sign + rounded.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

// change: what colours the cell, above 0 for worse; full: the change of the deepest colour.
export function cell(text, { detail = "", strong = false, change = null, full = 1 } = {}) {
  return { text, detail, strong, change, full };
}

function filled(tag, { text, detail, strong, change, full }, attributes = {}) {
  const colour = change > 0 ? "loss" : change < 0 ? "gain" : "";
  const made = element(tag, { ...attributes, class: [strong && "strong", colour].filter(Boolean).join(" ") || null }, text);
  if (colour) made.style.setProperty("--depth", depth(change, full));
  if (detail) made.append(" ", element("span", { class: "detail" }, detail));
  return made;
}

// From 0 to 1, logarithmic, so that small changes can be told apart.
function depth(change, full) {
  return Math.min(1, Math.log1p((9 * Math.abs(change)) / full) / Math.log(10)).toFixed(3);
}

export function table(title, columns, rows) {
  const head = element("tr", {}, ...columns.map((column) => element("th", { scope: "col" }, column)));
  const body = rows.map(([first, ...others]) =>
    element("tr", {}, filled("th", first, { scope: "row" }), ...others.map((one) => filled("td", one))),
  );
  return element(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": title },
    element("table", {}, element("caption", {}, title), element("thead", {}, head), element("tbody", {}, ...body)),
  );
}

const FULL_NATS = 4; // a change in log-probability that gets the deepest colour

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return share >= 0.01 || share === 0 ? `${share.toPrecision(3)} %` : `${share.toExponential(1)} %`;
}

// The texts of tokens, those that end within a character joined with what completes it.
function whole(tokens, bases) {
  const joined = [];
  let open = false;
  tokens.forEach(({ token, logprob }, index) => {
    const base = bases ? bases[index].logprob : null;
    if (open) {
      const last = joined.at(-1);
      last.text += token;
      last.logprob += logprob;
      if (bases) last.base += base;
    } else {
      joined.push({ text: token, logprob, base });
    }
    open = token === "";
  });
  return joined;
}

// tokens: with their log-probabilities; bases: the same tokens without a mask, null where there is nothing to compare.
export function tokenSpans(tokens, bases) {
  return whole(tokens, bases).map(({ text, logprob, base }) => {
    const change = base === null ? 0 : logprob - base;
    const says = base === null ? percent(logprob) : `${percent(logprob)}, without a mask ${percent(base)}`;
    const span = element("span", { class: `token ${change > 0 ? "up" : change < 0 ? "down" : ""}`, title: says }, visible(text));
    span.style.setProperty("--depth", Math.min(1, Math.abs(change) / FULL_NATS).toFixed(3));
    return span;
  });
}

// The same as a table, for those who do not point at things.
export function tokenTable(title, tokens, bases) {
  const rows = whole(tokens, bases).map(({ text, logprob, base }) => [
    cell(visible(text)),
    cell(percent(logprob)),
    ...(base === null ? [] : [cell(percent(base)), cell(figure(logprob - base, 2, true))]),
  ]);
  const columns = bases ? ["token", "probability", "without a mask", "change in nats"] : ["token", "probability"];
  return element("details", { class: "probabilities" }, element("summary", {}, "Token probabilities"), table(title, columns, rows));
}

// counts: neurons in each layer; most: what fills the height.
export function bars(counts, most, summary) {
  const width = 12, height = 60;
  const picture = element("svg", {
    role: "img",
    "aria-label": summary,
    viewBox: `0 0 ${counts.length * width} ${height}`,
    preserveAspectRatio: "none",
  });
  counts.forEach((count, layer) => {
    const tall = (height * count) / most;
    const place = { x: layer * width + 1, y: (height - tall).toFixed(2), width: width - 2, height: tall.toFixed(2) };
    picture.append(element("rect", place, element("title", {}, `layer ${layer}: ${count}`)));
  });
  return picture;
}
