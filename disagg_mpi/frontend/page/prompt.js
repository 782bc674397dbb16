// The prompt box: one request at a time, streamed from the server's own OpenAI API.

import { byId, duration, element, rate, setText } from "./dom.js";

const APIS = {
  chat: {
    url: new URL("../v1/chat/completions", import.meta.url),
    body: (prompt) => ({ messages: [{ role: "user", content: prompt }] }),
    text: (choice) => choice.delta?.content ?? "",
  },
  completion: {
    url: new URL("../v1/completions", import.meta.url),
    body: (prompt) => ({ prompt }),
    text: (choice) => choice.text ?? "",
  },
};

// The events of a stream that the server sends, as they come.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered ${response.status} ${response.statusText}`;
  }
}

// What this page measures of one answer: in the browser, so with the way there and back.
class Stopwatch {
  #start = performance.now();
  #first = 0;
  #last = 0;
  tokens = 0;

  sawTokens() {
    this.#last = performance.now();
    this.#first ||= this.#last;
    this.tokens += 1;
  }

  toString() {
    if (!this.#first) return "waiting for the first token …";
    const generating = (this.#last - this.#first) / 1000;
    const parts = [`TTFT ${duration((this.#first - this.#start) / 1000)}`, `${this.tokens} tokens`];
    if (generating > 0 && this.tokens > 1) parts.push(`${rate((this.tokens - 1) / generating)} tokens/s`);
    return parts.join(" · ");
  }
}

export class PromptBox {
  #headers;
  #open = null;

  // `headers`: a function that gives what a request must carry.
  constructor(headers) {
    this.#headers = headers;
    byId("prompt-form").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.#open) this.#send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("prompt-form").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.#open?.abort());
  }

  async #send() {
    const answer = byId("answer");
    const watch = new Stopwatch();
    answer.replaceChildren();
    this.#setOpen(new AbortController());
    const show = (note = "") => setText(byId("measured"), `${watch}${note}`);
    show();
    try {
      await this.#stream(watch, (text) => {
        const follows = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 30;
        answer.append(text);
        if (follows) answer.scrollTop = answer.scrollHeight;
      }, show);
      show();
    } catch (error) {
      if (error.name === "AbortError") {
        show(" · stopped");
      } else {
        setText(byId("measured"), "");
        answer.append(element("span", "problem", error instanceof TypeError
          ? "the server does not answer" : error.message));
      }
    } finally {
      this.#setOpen(null);
    }
  }

  async #stream(watch, write, show) {
    const api = APIS[byId("api").value];
    const response = await fetch(api.url, {
      method: "POST",
      signal: this.#open.signal,
      headers: { "content-type": "application/json", ...this.#headers() },
      body: JSON.stringify({
        ...api.body(byId("prompt").value), stream: true, stream_options: { include_usage: true },
        max_tokens: byId("max-tokens").valueAsNumber, temperature: byId("temperature").valueAsNumber }),
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of eventsOf(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) watch.tokens = event.usage.completion_tokens;
      const text = event.choices.map(api.text).join("");
      if (!text) continue;
      watch.sawTokens();
      write(text);
      show();
    }
  }

  #setOpen(controller) {
    this.#open = controller;
    byId("send").disabled = controller !== null;
    byId("stop").disabled = controller === null;
  }
}
