// Pieces of the Inspector's page: elements, cards, the tooltip, labels and colours. Names reach the page as text only.

const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const SCALE = VIRIDIS.map((colour, i) => [i / (VIRIDIS.length - 1), colour]);

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// plotly reads a little HTML in labels; this shows names as they are.
function plain(text) {
  return String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

function shortened(name, length) {
  return name.length <= length ? name : `…${name.slice(1 - length)}`;
}

// Labels for as many rows as fit, 13 px each, first and every n-th.
function rowTicks(names, height, length) {
  const every = Math.max(1, Math.ceil((names.length * 13) / Math.max(1, height)));
  const at = names.map((_, i) => i).filter((i) => i % every === 0);
  return { tickvals: at, ticktext: at.map((i) => plain(shortened(names[i], length))) };
}

function bytesUnit(largest) {
  return largest >= 1e9 ? { size: 1e9, name: "GB" } : { size: 1e6, name: "MB" };
}

// Bin edges that are labelled: zero and whole powers of two four apart, as far as the shown bins reach.
function valueTicks(edges, low, bins) {
  const tickvals = [];
  const ticktext = [];
  const middle = (edges.length - 2) / 2 - low;
  if (middle >= 0 && middle < bins) {
    tickvals.push(middle);
    ticktext.push("0");
  }
  const step = bins > 60 ? 6 : bins > 24 ? 4 : 2;
  for (let i = 0; i <= bins; i++) {
    const edge = edges[low + i];
    const power = Math.log2(Math.abs(edge));
    if (Math.abs(power - Math.round(power)) > 1e-6 || Math.round(power) % step || Math.abs(i - 0.5 - middle) < bins / 24) continue;
    tickvals.push(i - 0.5);
    const size = Math.abs(power) <= 10 ? (power >= 0 ? `${2 ** power}` : `1/${2 ** -power}`) : `2<sup>${power}</sup>`;
    ticktext.push(edge < 0 ? `−${size}` : size);
  }
  return { tickvals, ticktext };
}

class Tooltip {
  constructor(root) {
    this.root = root;
    this.element = h("div", { class: "wb-tip", role: "tooltip", hidden: true });
    root.append(this.element);
  }

  show(event, lines) {
    this.element.replaceChildren(...lines.map((line, i) => h(i ? "span" : "b", {}, line)));
    this.element.hidden = false;
    const box = this.root.getBoundingClientRect();
    const { offsetWidth: w, offsetHeight: t } = this.element;
    const x = event.clientX - box.left;
    const y = event.clientY - box.top;
    this.element.style.left = `${Math.max(4, Math.min(x + 12, box.width - w - 4))}px`;
    this.element.style.top = `${y + 16 + t > box.height ? y - t - 8 : y + 16}px`;
  }

  hide() {
    this.element.hidden = true;
  }
}

// A titled box with a plot, what it waits for, and room for a note or controls beside the title.
class Card {
  constructor(name, title, waiting, height, draw) {
    this.name = name;
    this.height = height;
    this.plot = h("div", { class: "wb-plot" });
    this.plot.style.height = `${height}px`;
    this.waiting = h("p", { class: "wb-waiting" }, waiting);
    this.aside = h("div", { class: "wb-aside" });
    this.foot = h("div", { class: "wb-foot" });
    this.title = h("h3", {}, title);
    const head = h("header", {}, this.title, this.aside);
    this.element = h("section", { class: "wb-card", "aria-label": title, "data-card": name }, head, this.plot, this.foot);
    this.plot.append(this.waiting);
    this.revision = 0;
    this.drawn = false;
    this.draw = draw;
  }

  get width() {
    return this.plot.clientWidth;
  }

  wait(text) {
    if (text) this.waiting.textContent = text;
    if (this.drawn) globalThis.Plotly.purge(this.plot);
    this.drawn = false;
    this.plot.replaceChildren(this.waiting);
  }

  async react(data, layout) {
    if (!this.drawn) this.plot.replaceChildren();
    const whole = { ...layout, height: this.height, datarevision: ++this.revision };
    await globalThis.Plotly.react(this.plot, data, whole, CONFIG);
    if (!this.drawn) this.listen?.();
    this.drawn = true;
  }

  purge() {
    if (this.drawn) globalThis.Plotly?.purge(this.plot);
  }
}

// A legend for a line chart: swatch, name, latest value.
function legendOf(entries) {
  const items = entries.map(({ colour, label, value, dash }) => {
    const swatch = h("i", { "aria-hidden": "true", class: dash ? "dashed" : "" });
    swatch.style.color = colour;
    return h("li", {}, swatch, h("span", {}, label), h("b", {}, value));
  });
  return h("ul", { class: "wb-legend" }, ...items);
}

function lastOf(line) {
  const at = line ? line.y.findLastIndex((v) => v !== null) : -1;
  return at < 0 ? null : line.y[at];
}

function scaleBar(low, high) {
  const bar = h("i", { "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${VIRIDIS.join(",")})`;
  return h("div", { class: "wb-scale" }, h("span", {}, low), bar, h("span", {}, high));
}

function powerOfTen(exponent) {
  return Math.abs(exponent) < 3 ? compact(10 ** exponent) : (10 ** exponent).toExponential(0).replace("e+", "e");
}
