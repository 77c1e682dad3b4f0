// Pieces of the Inspector's page: elements, cards, the tooltip, legends and colours. Names reach the page as text only.

const VIRIDIS = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const SCALE = scaleOf(VIRIDIS);
// Densities rise out of the page's own background, in even steps of lightness.
const DENSITY = {
  light: ["#cfe0f7", "#97bcee", "#5f93dd", "#3569bd", "#1b428c", "#0d2558"],
  dark: ["#1a3153", "#234b83", "#3169b4", "#5a90dc", "#95bbf2", "#dbe8fc"],
};

// What grew against the other run, and what shrank: two colours that differ in lightness alike, and in blueness for every eye.
const RATIO = {
  light: ["#1d4f91", "#5b8ac4", "#b3cae6", "#ffffff", "#f1c694", "#d0883a", "#8a4b08"],
  dark: ["#a9cbff", "#5f8fd0", "#2c4a75", "#111111", "#6b4718", "#c07f2c", "#ffd08a"],
};
const BROKEN = "#e5484d";

function ratioScale(colours) {
  const scale = [...RATIO[colours.dark ? "dark" : "light"]];
  scale[3] = colours.back;
  return scale;
}

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

// Which bins to draw of rows of counts: [low, inner, outer, high]. Those about zero, inner to outer, hold under a twentieth of any
// row's values that are not zero, and are drawn as one; outside low to high no row has a five-hundredth of its values.
function shownBins(rows, bins) {
  const middle = (bins - 1) / 2;
  let [low, high, most] = [bins, 0, 0];
  const near = new Float64Array(middle + 1); // by distance from zero: the largest share of a row within it
  for (const row of rows) {
    let total = 0;
    for (let i = 0; i < bins; i++) total += row[i];
    if (!total) continue;
    for (let i = 0; i < bins; i++) {
      if (row[i] / total > 0.002) {
        low = Math.min(low, i);
        high = Math.max(high, i + 1);
      }
    }
    const apart = total - row[middle] || 1;
    let held = 0;
    for (let d = 1; d <= middle; d++) {
      held += row[middle - d] + row[middle + d];
      near[d] = Math.max(near[d], held / apart);
    }
    most++;
  }
  if (!most) return [middle - 4, middle - 3, middle + 4, middle + 5];
  let folded = 0;
  while (folded < middle - 4 && near[folded + 1] <= 0.05) folded++;
  const [inner, outer] = [middle - folded, middle + 1 + folded];
  return [Math.min(low, inner - 1), inner, outer, Math.max(high, outer + 1)];
}

// A row's counts in the bins of shownBins.
function foldedRow(row, [low, inner, outer, high]) {
  const out = [];
  for (let i = low; i < inner; i++) out.push(row[i]);
  let middle = 0;
  for (let i = inner; i < outer; i++) middle += row[i];
  out.push(middle);
  for (let i = outer; i < high; i++) out.push(row[i]);
  return out;
}

function foldedEdges(edges, [low, inner, outer, high]) {
  return [...edges.slice(low, inner + 1), ...edges.slice(outer, high + 1)];
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

// A titled box with a plot, what it waits for, and room for controls beside the title and below. Lines at a step, chosen or
// pointed at, are moved over the plot without drawing it anew.
class Card {
  constructor(name, title, waiting, height, { timed = true } = {}) {
    this.name = name;
    this.height = height;
    this.timed = timed;
    this.plot = h("div", { class: "wi-plot", role: "figure", "aria-label": title });
    this.marks = Object.fromEntries(["cursor", "pointer"].map((mark) => [mark, h("i", { class: `wi-mark ${mark}`, hidden: true, "aria-hidden": "true" })]));
    this.at = { cursor: null, pointer: null };
    this.frame = h("div", { class: "wi-frame" }, this.plot, ...Object.values(this.marks));
    this.empty = waiting; // said when there is nothing to draw
    this.waiting = h("p", { class: "wi-waiting" });
    this.aside = h("div", { class: "wi-aside" });
    this.foot = h("div", { class: "wi-foot" });
    this.title = h("h3", {}, title);
    this.head = h("header", {}, this.title, this.aside);
    this.element = h("section", { class: "wi-card", "aria-label": title, "data-card": name }, this.head, this.frame, this.foot);
    this.resize(height);
    this.plot.append(this.waiting);
    this.revision = 0;
    this.drawn = false;
  }

  get width() {
    return this.plot.clientWidth;
  }

  resize(height) {
    this.height = height;
    this.plot.style.height = `${height}px`;
  }

  wait() {
    this.waiting.textContent = this.empty;
    if (this.drawn) globalThis.Plotly.purge(this.plot);
    this.drawn = false;
    this.plot.replaceChildren(this.waiting);
    this.place();
  }

  async react(data, layout) {
    if (!this.drawn) this.plot.replaceChildren();
    const whole = { ...layout, height: this.height, datarevision: ++this.revision };
    if (this.timed) {
      Object.assign(whole, { xaxis: { ...whole.xaxis, range: this.range() }, uirevision: null });
      for (const axis of ["yaxis", "yaxis2"]) if (whole[axis]) whole[axis].fixedrange = true; // a drag zooms into time
    }
    await globalThis.Plotly.react(this.plot, data, whole, { ...CONFIG, doubleClick: this.timed ? false : CONFIG.doubleClick });
    if (!this.drawn) this.listen?.();
    this.drawn = true;
    this.place();
  }

  legend(entries) {
    this.entries = entries;
    this.aside.replaceChildren(legendOf(entries, this.at.cursor));
  }

  mark(which, step) {
    this.at[which] = step;
    if (which === "cursor") this.aside.querySelector(".wi-legend")?.update?.(step);
    this.place();
  }

  place() {
    const layout = this.drawn && this.timed ? this.plot._fullLayout : null;
    for (const [which, mark] of Object.entries(this.marks)) {
      const step = this.at[which];
      const at = layout && step !== null ? layout.xaxis.l2p(step) : NaN;
      mark.hidden = !(at >= -1 && at <= layout.xaxis._length + 1);
      if (mark.hidden) continue;
      mark.style.transform = `translateX(${layout.xaxis._offset + at}px)`;
      mark.style.top = `${layout._size.t}px`;
      mark.style.height = `${layout._size.h}px`;
    }
  }

  purge() {
    if (this.drawn) globalThis.Plotly?.purge(this.plot);
  }
}

// A legend for a line chart: swatch, name, and a value: a text, or with `line` and `text` that of the line at the cursor.
function legendOf(entries, step = null) {
  const values = [];
  const items = entries.map(({ colour, label, value, dash, line, text }) => {
    const swatch = h("i", { "aria-hidden": "true", class: dash ? "dashed" : "" });
    swatch.style.color = colour;
    const shown = h("b", {}, value);
    if (line) values.push((at) => (shown.textContent = text(at === null ? lastOf(line) : valueAt(line, at))));
    return h("li", {}, swatch, h("span", {}, label), shown);
  });
  const list = h("ul", { class: "wi-legend" }, ...items);
  list.update = (at) => values.forEach((update) => update(at));
  list.update(step);
  return list;
}

// Index of the last of ascending x that is not past a step; -1 where all are.
function indexAt(x, step) {
  let [low, high] = [0, x.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] <= step) low = middle + 1;
    else high = middle;
  }
  return low - 1;
}

function valueAt(line, step) {
  const at = indexAt(line.x, step);
  return at < 0 ? null : line.y[at];
}

// One of a few choices, as joined buttons; `current` is pressed.
function segmented(label, choices, current, choose) {
  const press = (value) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.value === value));
    choose(value);
  };
  const buttons = choices.map(([value, text, title]) => h("button", { type: "button", value, "aria-pressed": String(value === current), title, onclick: () => press(value) }, text));
  return h("div", { class: "wi-segments", role: "group", "aria-label": label }, ...buttons);
}

// Ticks of a logarithmic axis: decades, or 1, 2, 5 of each where there are few.
function logTicks(low, high) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const wide = Math.log10(high / low) > 1.6;
  const every = Math.max(1, Math.ceil((last - first) / 6));
  const tickvals = [];
  for (let power = first; power <= last; power++) {
    if (wide && (power - first) % every) continue;
    for (const factor of wide ? [1] : [1, 2, 5]) tickvals.push(factor * 10 ** power);
  }
  return { type: "log", tickvals, ticktext: tickvals.map((v) => powerText(v)) };
}

function powerText(value) {
  return value >= 1e-3 && value < 1e5 ? compact(value) : value.toExponential(0).replace("e+", "e").replace("-", "−");
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
