// The service's routes, as the page uses them. The key lives in this module only, until the page is closed.

let key = "";

export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export function useKey(text) {
  const trimmed = text.trim();
  if (!/^[\x21-\x7e]*$/.test(trimmed)) throw new Error("An API key has no blanks and only ASCII letters, digits and signs.");
  key = trimmed;
}

async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key && { "x-api-key": key }) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers, credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached.");
  }
  if (response.ok) return response;
  const error = (await response.json().catch(() => null))?.error;
  throw new Refused(response.status, error?.code, error?.message ?? `The server answered ${response.status}.`);
}

export async function get(path) {
  return (await ask(path)).json();
}

function post(path, body, signal) {
  return ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
}

export async function score(body, signal) {
  return (await post("score", body, signal)).json();
}

export async function languageOf(text, signal) {
  return (await (await post("languages", { text: [text] }, signal)).json()).languages[0];
}

// The events of a streamed generation, until it has ended. Throws for an error among them, and for a stream cut off.
export async function* generate(body, signal) {
  const response = await post("generate", { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new Error("The server ended the answer early.");
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const content = JSON.parse(data);
        if (content.error) throw new Refused(0, content.error.code, content.error.message);
        yield content;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
