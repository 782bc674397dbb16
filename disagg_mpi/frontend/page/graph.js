// The last minutes as graphs. The history is this page's own: the server keeps none, so it begins when the
// page is opened and has holes where the page was hidden or the server away.

import { element, rate, setText, svgElement } from "./dom.js";

const SECONDS = 120;
const HOLE_SECONDS = 3;
const HEIGHT = 100;

// A round number that is at least `value`.
function ceiling(value, least) {
  const size = 10 ** Math.floor(Math.log10(Math.max(value, least)));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => step >= value && step >= least);
}

// Points [time, low, high], oldest first, as closed areas: one for each stretch without a hole.
function areas(points, now, top) {
  const x = (at) => (SECONDS - (now - at)).toFixed(2);
  const y = (value) => (HEIGHT * (1 - value / top)).toFixed(2);
  const stretches = [];
  for (const point of points) {
    const last = stretches.at(-1);
    if (last && point[0] - last.at(-1)[0] < HOLE_SECONDS) last.push(point);
    else stretches.push([point]);
  }
  const line = (stretch, part) => stretch.map((point) => `${x(point[0])} ${y(point[part])}`).join("L");
  return {
    area: stretches.map((part) => `M${line(part, 2)}L${line([...part].reverse(), 1)}Z`).join(""),
    line: stretches.map((part) => `M${line(part, 2)}`).join(""),
  };
}

// One graph of stacked areas; `line`: the class of a line on the topmost one.
export class Graph {
  #points = [];
  #areas;
  #line = null;
  #top;
  #least;

  constructor(host, label, classNames, { least = 1, line = "" } = {}) {
    this.#least = least;
    const svg = svgElement("svg", {
      viewBox: `0 0 ${SECONDS} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label });
    this.#areas = classNames.map((name) => svgElement("path", { class: name }));
    svg.append(...this.#areas);
    if (line) svg.append(this.#line = svgElement("path", { class: line }));
    this.#top = element("span", "top");
    host.append(svg, this.#top, element("span", "past", `${SECONDS / 60} min ago`), element("span", "now", "now"));
  }

  clear() {
    this.#points = [];
  }

  // `values`: one for each class, stacked in this order.
  add(at, values) {
    this.#points = this.#points.filter((point) => point.at > at - SECONDS - HOLE_SECONDS);
    this.#points.push({ at, values });
    this.#draw(at);
  }

  #draw(now) {
    const sums = this.#points.map((point) => point.values.reduce((sum, value) => sum + value, 0));
    const top = ceiling(Math.max(...sums), this.#least);
    setText(this.#top, rate(top).replace(".0", ""));
    let below = this.#points.map(() => 0);
    this.#areas.forEach((path, index) => {
      const above = this.#points.map((point, place) => below[place] + point.values[index]);
      const drawn = areas(this.#points.map((point, place) => [point.at, below[place], above[place]]), now, top);
      path.setAttribute("d", drawn.area);
      this.#line?.setAttribute("d", drawn.line);
      below = above;
    });
  }
}
