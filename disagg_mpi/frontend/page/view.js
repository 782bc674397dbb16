// One state of the server, drawn. What it means is said in frontend/page/state.py, which makes it.

import { byId, bytes, count, duration, element, legend, percent, rate, setText, span } from "./dom.js";
import { Graph } from "./graph.js";

const PHASES = [
  ["queued", "queued"], ["context", "context"], ["hand-over", "handover"], ["generation", "generation"]];
const PARTS = [
  ["queue", "queued", "queue"], ["other", "other", "on the way"], ["context", "context", "context"],
  ["handover", "handover", "hand-over"], ["generation", "generation", "generation"]];
const LATENCIES = [
  ["ttft", "TTFT", "Time to first token: from submission until it was at rank 0"],
  ["itl", "ITL", "Inter-token latency: every gap between a request's tokens as rank 0 saw them"],
  ["tpot", "TPOT", "Time per output token: each request's mean after its first token"]];
const RATE_SECONDS = 2;

export class View {
  #last = null;
  #samples = [];
  #cards = new Map();
  #newest = null;
  #rateGraph = new Graph(byId("rate-graph"), "tokens a second", ["under"], { least: 10, line: "rate" });
  #openGraph = new Graph(byId("open-graph"), "open requests by phase", PHASES.map(([, name]) => name),
                         { least: 4 });

  constructor() {
    byId("legend").append(...legend(PARTS.map(([, name, text]) => [name, text])));
    byId("latency").tBodies[0].append(...LATENCIES.map(([, name, title]) => {
      const heading = element("th", "", name);
      heading.scope = "row";
      heading.title = title;
      return element("tr", "", "", heading, ...[1, 2, 3, 4].map(() => element("td")));
    }));
  }

  show(state) {
    if (this.#last && state.at < this.#last.at) this.#forget();
    this.#head(state);
    this.#latency(state);
    this.#instances(state);
    this.#recent(state.recent);
    if (!this.#last || state.at > this.#last.at) this.#history(state);
    this.#last = state;
  }

  // Another server has taken this one's place.
  #forget() {
    this.#last = this.#newest = null;
    this.#samples = [];
    this.#rateGraph.clear();
    this.#openGraph.clear();
  }

  #head(state) {
    const health = byId("health");
    setText(health, state.problem ?? "healthy");
    health.className = `pill ${state.problem ? "bad" : "good"}`;
    setText(byId("model"), state.model);
    document.title = `${state.problem ? "⚠ " : ""}${state.model} · disagg_mpi`;
    const ended = Object.entries(state.outcomes).filter(([name, number]) => number || name === "done");
    setText(byId("totals"), [
      ...ended.map(([name, number]) => `${count(number)} ${name}`),
      ...(state.num_refused ? [`${count(state.num_refused)} refused`] : []),
      `up ${span(state.uptime)}`, `v${state.version}`].join(" · "));
  }

  #history(state) {
    this.#samples.push({ at: state.at, tokens: state.num_tokens });
    while (this.#samples.length > 2 && this.#samples[1].at < state.at - RATE_SECONDS) this.#samples.shift();
    const [first, second] = this.#samples;
    if (!second) return;
    const perSecond = (state.num_tokens - first.tokens) / (state.at - first.at);
    const values = PHASES.map(([phase]) => state.phases[phase]);
    setText(byId("rate"), rate(perSecond));
    setText(byId("open"), count(values.reduce((sum, value) => sum + value, 0)));
    byId("phases").replaceChildren(...legend(
      PHASES.map(([phase, name], index) => [name, `${phase} ${count(values[index])}`])));
    this.#rateGraph.add(state.at, [perSecond]);
    this.#openGraph.add(state.at, values);
  }

  #latency(state) {
    LATENCIES.forEach(([name], index) => {
      const { p50, p90, p99, count: number } = state[name];
      const cells = byId("latency").tBodies[0].rows[index].cells;
      [duration(p50), duration(p90), duration(p99), count(number)].forEach(
        (text, column) => setText(cells[column + 1], text));
    });
    setText(byId("latency-note"), `Of the last ${span(state.window)}. TTFT and TPOT: requests that have ended; `
      + "ITL: all gaps between tokens.");
  }

  #instances(state) {
    const host = byId("ranks");
    const key = JSON.stringify(state.instances.map(({ id, ranks, shape, hosts }) => [id, ranks, shape, hosts]));
    if (host.dataset.key !== key) {
      host.dataset.key = key;
      this.#cards = new Map(state.instances.map((instance) => [instance.id, new Card(instance)]));
      host.replaceChildren(orchestratorCard(state), ...[...this.#cards.values()].map((card) => card.node));
    }
    setText(byId("queued"), `${count(state.phases.queued)} requests wait for a place`);
    for (const instance of state.instances) this.#cards.get(instance.id).show(instance);
  }

  #recent(timelines) {
    const newest = timelines.length ? timelines[0].number : 0;
    if (newest === this.#newest) return;
    this.#newest = newest;
    const scale = Math.max(...timelines.map((timeline) => timeline.total), 0);
    byId("recent-empty").hidden = newest > 0;
    byId("recent").hidden = newest === 0;
    setText(byId("scale"), duration(scale));
    byId("recent").tBodies[0].replaceChildren(...timelines.map((timeline) => row(timeline, scale)));
  }
}

function orchestratorCard(state) {
  const queued = element("span");
  queued.id = "queued";
  return element("article", "instance", "",
    element("h3", "", "orchestrator", element("span", "", "HTTP")),
    places([0], [state.host], null),
    element("div", "pair", "", element("span", "", "context length"),
      element("span", "", `${count(state.max_model_len)} tokens`)),
    element("div", "pair", "", queued));
}

// The ranks of an instance, by the hosts that they are on.
function places(ranks, hosts, deviceIds) {
  const list = element("ul", "places");
  ranks.forEach((rank, index) => {
    if (hosts[index] && hosts[index] !== hosts[index - 1]) list.append(element("li", "host", hosts[index]));
    const device = deviceIds ? ` · device ${deviceIds[index]}` : "";
    const leads = index === 0 && ranks.length > 1 ? " · leader" : "";
    list.append(element("li", "rank", `rank ${rank}${leads}${device}`));
  });
  return list;
}

// One instance: made once, then only its figures change.
class Card {
  #bar = element("div");
  #blocks = element("span");
  #requests = element("span");
  #waiting = element("span");
  #meter;

  constructor(instance) {
    this.#meter = element("div", "meter", "", this.#bar);
    this.#meter.role = "meter";
    this.#meter.ariaValueMin = "0";
    this.#meter.ariaValueMax = String(instance.num_blocks);
    this.#meter.ariaLabel = `KV blocks of ${instance.name}`;
    this.node = element("article", `instance role-${instance.role}`, "",
      element("h3", "", instance.name, element("span", "", instance.shape)),
      places(instance.ranks, instance.hosts, instance.device_ids),
      this.#meter,
      element("div", "pair", "", element("span", "", "KV blocks"), this.#blocks),
      element("div", "pair", "", this.#requests, this.#waiting));
    this.node.dataset.instance = instance.name;
  }

  show(instance) {
    const { promised_blocks: used, num_blocks: total, tokens_per_block: size } = instance;
    const share = total ? used / total : 0;
    this.#bar.style.width = `${(100 * share).toFixed(2)}%`;
    this.#meter.ariaValueNow = String(used);
    this.#meter.title = `${count(used * size)} of ${count(total * size)} tokens; ${size} tokens a block`;
    setText(this.#blocks, `${count(used)} of ${count(total)} · ${percent(share)}`);
    setText(this.#requests, `${count(instance.num_requests)} of ${count(instance.max_batch_size)} requests`);
    const isSilent = instance.silent_seconds > 10;
    this.#waiting.className = isSilent ? "warn" : "";
    setText(this.#waiting, isSilent ? `silent for ${span(instance.silent_seconds)}`
      : instance.pending_context_tokens ? `${count(instance.pending_context_tokens)} tokens to compute` : "");
  }
}

function row(timeline, scale) {
  const began = new Date(timeline.started_at * 1000).toLocaleTimeString("en-GB");
  const cached = timeline.cached_tokens ? ` (${count(timeline.cached_tokens)} cached)` : "";
  const tokens = element("td", "number", "",
    count(timeline.prompt_tokens), element("span", "cached wide", cached), ` → ${count(timeline.output_tokens)}`);
  const copies = timeline.num_choices > 1 ? ` ×${timeline.num_choices}` : "";
  const bar = element("div", "bar");
  for (const [part, name] of PARTS) {
    if (!timeline[part]) continue;
    const segment = element("div", name);
    segment.style.width = `${(100 * timeline[part] / scale).toFixed(3)}%`;
    bar.append(segment);
  }
  bar.title = explanation(timeline);
  const made = element("tr", "", "",
    element("td", "began", began), element("td", "wide", timeline.api + copies),
    element("td", `outcome-${timeline.outcome}`, timeline.outcome), tokens,
    element("td", "number wide", duration(timeline.ttft)), element("td", "number", duration(timeline.total)),
    element("td", "timeline", "", bar));
  made.dataset.number = timeline.number;
  return made;
}

function explanation(timeline) {
  const lines = PARTS.map(([part, , text]) => `${text}: ${duration(timeline[part])}`);
  if (timeline.transport) {
    lines[3] += `, ${bytes(timeline.handover_bytes)} of ${bytes(timeline.kv_bytes)} moved (${timeline.transport})`;
  }
  lines.push(`first token after ${duration(timeline.ttft)}, each next ${duration(timeline.tpot)}`,
             `${count(timeline.prompt_tokens)} prompt tokens, ${count(timeline.cached_tokens)} of them cached, `
             + `${count(timeline.output_tokens)} generated`);
  if (timeline.num_preempted) lines.push(`computed again ${timeline.num_preempted} times`);
  return lines.join("\n");
}
