// Elements and figures: what the other modules draw with. Text only ever becomes text: no markup is parsed.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(tag, className = "", text = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== "") made.textContent = text;
  made.append(...children);
  return made;
}

export function svgElement(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// Writing what is there already would make the browser lay the page out again.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const digits = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));

export function duration(seconds) {
  if (!seconds) return "–";
  if (seconds < 0.9995e-3) return `${Math.round(seconds * 1e6)} µs`;
  if (seconds < 0.9995) return `${digits(seconds * 1e3)} ms`;
  if (seconds < 120) return `${digits(seconds)} s`;
  return span(seconds);
}

export function span(seconds) {
  if (seconds < 120) return `${Math.floor(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

export const count = (number) => number.toLocaleString("en");

export function rate(perSecond) {
  return perSecond >= 100 ? count(Math.round(perSecond)) : perSecond.toFixed(1);
}

export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export function bytes(number) {
  if (number < 1024) return `${number} B`;
  for (const unit of ["KiB", "MiB"]) {
    number /= 1024;
    if (number < 1024) return `${number.toFixed(1)} ${unit}`;
  }
  return `${(number / 1024).toFixed(1)} GiB`;
}

export function legend(entries) {
  return entries.map(([className, text]) => element("span", "", "", element("i", className), text));
}
