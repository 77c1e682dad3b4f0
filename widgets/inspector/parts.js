// Pieces of the Inspector's page: elements, cards, the tooltip, labels and colours. Names reach the page as text only.

const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const SCALE = scaleOf(VIRIDIS);
// Densities rise out of the page's own background, in even steps of lightness.
const DENSITY = {
  light: ["#cfe0f7", "#97bcee", "#5f93dd", "#3569bd", "#1b428c", "#0d2558"],
  dark: ["#1a3153", "#234b83", "#3169b4", "#5a90dc", "#95bbf2", "#dbe8fc"],
};

function scaleOf(colours) {
  return colours.map((colour, i) => [i / (colours.length - 1), colour]);
}

function densityScale(colours) {
  return [colours.back, ...DENSITY[colours.dark ? "dark" : "light"]];
}

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

// Labels of a value axis whose cells have these edges: 0 on the cell about zero, whole powers of two elsewhere.
function valueTicks(edges) {
  const middle = edges.findIndex((edge, i) => edge < 0 && edges[i + 1] > 0);
  const powers = edges.map((edge) => Math.log2(Math.abs(edge)));
  const reach = Math.max(...powers) - Math.min(...powers);
  const step = reach > 16 ? 6 : reach > 9 ? 4 : 2;
  const tickvals = [middle];
  const ticktext = ["0"];
  edges.forEach((edge, i) => {
    const power = Math.round(powers[i]);
    if (Math.abs(powers[i] - power) > 1e-3 || power % step || Math.abs(i - 0.5 - middle) < edges.length / 9) return;
    const size = Math.abs(power) <= 10 ? (power >= 0 ? `${2 ** power}` : `1/${2 ** -power}`) : `2<sup>${power}</sup>`;
    tickvals.push(i - 0.5);
    ticktext.push(edge < 0 ? `−${size}` : size);
  });
  return { tickvals, ticktext };
}

// Like the kernel's shown_bins, for one layer over time: bins without a five-hundredth of the values are left out, those about
// zero that hold under a twentieth of what is not zero are drawn as one.
function folded(columns, edges) {
  const bins = edges.length - 1;
  const middle = (bins - 1) / 2;
  const sum = new Float64Array(bins);
  for (const column of columns) for (let i = 0; i < bins; i++) sum[i] += column[i] || 0;
  const total = sum.reduce((a, b) => a + b, 0) || 1;
  let low = sum.findIndex((v) => v / total > 0.002);
  let high = sum.findLastIndex((v) => v / total > 0.002) + 1;
  if (low < 0) [low, high] = [middle - 4, middle + 5];
  const apart = total - sum[middle] || 1;
  let inner = middle;
  for (let held = 0; inner > 4; inner--) {
    held += sum[inner - 1] + sum[2 * middle - inner + 1];
    if (held / apart > 0.05) break;
  }
  const outer = 2 * middle - inner + 1;
  low = Math.min(low, inner - 1);
  high = Math.max(high, outer + 1);
  const rows = [];
  for (let i = low; i < inner; i++) rows.push([i, i + 1]);
  rows.push([inner, outer]);
  for (let i = outer; i < high; i++) rows.push([i, i + 1]);
  const counts = rows.map(([from, to]) => columns.map((column) => column.subarray(from, to).reduce((a, b) => a + (b || 0), 0)));
  return { counts, edges: [...rows.map(([from]) => edges[from]), edges[high]] };
}

class Tooltip {
  constructor(root) {
    this.root = root;
    this.element = h("div", { class: "wi-tip", role: "tooltip", hidden: true });
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
    this.plot = h("div", { class: "wi-plot", role: "figure", "aria-label": title });
    this.plot.style.height = `${height}px`;
    this.waiting = h("p", { class: "wi-waiting" }, waiting);
    this.aside = h("div", { class: "wi-aside" });
    this.foot = h("div", { class: "wi-foot" });
    this.title = h("h3", {}, title);
    const head = h("header", {}, this.title, this.aside);
    this.element = h("section", { class: "wi-card", "aria-label": title, "data-card": name }, head, this.plot, this.foot);
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
  return h("ul", { class: "wi-legend" }, ...items);
}

function lastOf(line) {
  const at = line ? line.y.findLastIndex((v) => v !== null) : -1;
  return at < 0 ? null : line.y[at];
}

function scaleBar(low, high, colours = VIRIDIS) {
  const bar = h("i", { "aria-hidden": "true" });
  bar.style.background = `linear-gradient(to right, ${colours.join(",")})`;
  return h("div", { class: "wi-scale" }, h("span", {}, low), bar, h("span", {}, high));
}

function powerOfTen(exponent) {
  return Math.abs(exponent) < 3 ? compact(10 ** exponent) : (10 ** exponent).toExponential(0).replace("e+", "e");
}
