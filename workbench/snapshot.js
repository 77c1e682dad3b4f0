// Draws a memory snapshot (see snapshots.py): allocations over time, the largest at a moment, the map of the segments.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = {
  parameters: "#4b7fe0", optimizer: "#8a66cc", buffers: "#5aa7c7", average: "#b08a5a", exchange: "#c76aa5", teacher: "#7d6a58",
  data: "#7fa83c", gradients: "#d98a1f", activations: "#2a9d82", temporary: "#d65f55", other: "#8d959e",
};
const WORDS = { optimizer: "optimizer state", average: "average of weights", exchange: "exchange of gradients", data: "samples", temporary: "temporary" };
const LINES = ["#4b7fe0", "#d98a1f", "#2a9d82", "#d65f55", "#8a66cc", "#7fa83c", "#5aa7c7", "#c76aa5", "#b08a5a", "#52616f"];
const REST = "#8d959e";
const LEFT = 64;
const page = document.getElementById("page");
const { size, start, end, holder, stack } = data.allocations;
const wordOf = (name) => WORDS[name] ?? name;
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function bytes(n) {
  const unit = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([least]) => Math.abs(n) >= least);
  return unit ? `${(n / unit[0]).toLocaleString("en", { maximumSignificantDigits: 3 })} ${unit[1]}` : `${n} B`;
}

// -- frames ----------------------------------------------------------------------------------------------------------

const library = ([file]) => file.startsWith("torch/");
const frameText = ([file, line, name]) => `${file.split("/").at(-1)}:${line} ${name}`;

function framesOf(index) {
  return index < 0 ? [] : data.stacks[index].map((frame) => data.frames[frame]);
}

// The innermost frame that is not PyTorch's own.
function lineOf(index, from) {
  const frames = framesOf(index);
  if (!frames.length) return from === 0 ? "from before the history" : "no Python frame (backward pass)";
  return frameText(frames.find((frame) => !library(frame)) ?? frames[0]);
}

// -- allocations over time -------------------------------------------------------------------------------------------

const EVENTS = data.events;

function curve(members) {
  const held = new Float64Array(EVENTS + 2);
  for (const i of members) {
    held[start[i]] += size[i];
    if (end[i] >= 0) held[end[i]] -= size[i];
  }
  for (let e = 1; e <= EVENTS; e++) held[e] += held[e - 1];
  return held.subarray(0, EVENTS + 1);
}

const everything = curve(size.keys());
const PEAK = everything.reduce((best, value, e) => (value > everything[best] ? e : best), 0);
const alive = (i, e) => start[i] <= e && (end[i] < 0 || end[i] > e);

function grouped(keys, colourOf) {
  const members = new Map();
  keys.forEach((key, i) => (members.get(key) ?? members.set(key, []).get(key)).push(i));
  return [...members].map(([name, own]) => ({ name, colour: colourOf(name), held: curve(own) }));
}

function byHolder() {
  const found = grouped(holder.map((h) => data.holders[h]), (name) => COLOURS[name]);
  return found.sort((a, b) => data.holders.indexOf(a.name) - data.holders.indexOf(b.name)).map((g) => ({ ...g, name: wordOf(g.name) }));
}

function byLine() {
  const lines = size.map((_, i) => lineOf(stack[i], start[i]));
  const atPeak = new Map();
  lines.forEach((line, i) => atPeak.set(line, (atPeak.get(line) ?? 0) + (alive(i, PEAK) ? size[i] : 0)));
  const kept = [...atPeak].sort((a, b) => b[1] - a[1]).slice(0, LINES.length).map(([line]) => line);
  const found = grouped(lines.map((line) => (kept.includes(line) ? line : "other lines")), (name) => LINES[kept.indexOf(name)] ?? REST);
  const place = (name) => (kept.includes(name) ? kept.indexOf(name) : kept.length);
  return found.sort((a, b) => place(a.name) - place(b.name));
}

function phaseAt(e) {
  const mark = data.marks.filter(([at]) => at <= e + 1).at(-1);
  return mark ? `step ${mark[1]}, ${mark[2] === "between" ? "between steps" : mark[2] === "update" ? "update" : `${mark[2]} pass`}` : "";
}

function canvasOf(label, height) {
  const canvas = h("canvas", { role: "img", "aria-label": label, tabindex: "0" });
  canvas.style.height = `${height}px`;
  return canvas;
}

function contextOf(canvas) {
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.clientWidth * ratio;
  canvas.height = canvas.clientHeight * ratio;
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "11px system-ui, sans-serif";
  return context;
}

function niceStep(most) {
  const rough = most / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  return [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough);
}

const tip = h("div", { class: "tip", hidden: true });
function showTip(event, lines) {
  tip.replaceChildren(...lines.map((line, i) => h(i ? "div" : "b", {}, line)));
  tip.hidden = false;
  const left = Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${event.pageY + 14}px`;
}
const hideTip = () => (tip.hidden = true);

class Timeline {
  constructor() {
    this.groups = byHolder();
    this.at = PEAK;
    this.canvas = canvasOf("Allocated bytes over time, stacked by who holds them", 300);
    this.legend = h("ul", { class: "legend" });
    this.table = h("tbody");
    this.moment = h("h2");
    const pick = (label, groups) => h("button", { type: "button", "aria-pressed": String(label === "by holder"), onclick: (event) => this.choose(event.target, groups) }, label);
    this.switch = h("div", { class: "switch", role: "group", "aria-label": "What to stack" }, pick("by holder", byHolder), pick("by line of code", byLine));
    const head = h("header", {}, h("h2", {}, "Allocations over time"), this.switch, h("span", { class: "quiet" }, "each event is an allocation or a release; click a moment"));
    const names = h("thead", {}, h("tr", {}, h("th", { class: "number" }, "bytes"), h("th", { class: "number" }, "blocks"), h("th", {}, "holder"), h("th", {}, "allocated by")));
    this.elements = [h("section", {}, head, this.canvas, this.legend), h("section", {}, h("header", {}, this.moment), h("table", {}, names, this.table))];
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", hideTip);
    this.canvas.addEventListener("click", (event) => this.pin(this.eventAt(event)));
    this.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) this.pin(Math.max(0, Math.min(EVENTS, this.at + step * Math.max(1, Math.round(EVENTS / 200)))));
    });
  }

  choose(button, groups) {
    for (const other of this.switch.children) other.setAttribute("aria-pressed", String(other === button));
    this.groups = groups();
    this.draw();
  }

  eventAt(event) {
    const x = event.clientX - this.canvas.getBoundingClientRect().left - LEFT;
    const column = Math.max(0, Math.min(this.columns.length - 1, Math.floor((x / this.wide) * this.columns.length)));
    return this.columns[column];
  }

  pin(e) {
    this.at = e;
    this.draw();
  }

  hover(event) {
    const e = this.eventAt(event);
    const parts = this.groups.map((g) => [g.name, g.held[e]]).filter(([, n]) => n > 0).sort((a, b) => b[1] - a[1]).slice(0, 6);
    showTip(event, [`${bytes(everything[e])} allocated`, `event ${e.toLocaleString("en")}${phaseAt(e) ? `: ${phaseAt(e)}` : ""}`, ...parts.map(([name, n]) => `${bytes(n)} ${name}`)]);
  }

  draw() {
    const [width, height, top, bottom] = [this.canvas.clientWidth, 300, 22, 20];
    const tall = height - top - bottom;
    this.wide = width - LEFT - 4;
    if (this.wide < 1) return; // a frame that is hidden has no width
    const context = contextOf(this.canvas);
    // One event a column, the fullest of those that share it, so that no peak is lost.
    const count = Math.min(EVENTS + 1, Math.floor(this.wide));
    this.columns = Array.from({ length: count }, (_, c) => {
      const [from, to] = [Math.floor((c * (EVENTS + 1)) / count), Math.floor(((c + 1) * (EVENTS + 1)) / count)];
      let best = from;
      for (let e = from; e < to; e++) if (everything[e] > everything[best]) best = e;
      return best;
    });
    const most = everything[PEAK] || 1;
    const x = (c) => LEFT + (c * this.wide) / count;
    const y = (n) => top + tall * (1 - n / (1.04 * most));
    const [line, quiet] = [style("--line"), style("--quiet")];
    this.drawAxes(context, { most, y, width, line, quiet });
    const floor = new Float64Array(count);
    for (const group of this.groups) {
      context.fillStyle = group.colour;
      context.beginPath();
      context.moveTo(x(0), y(floor[0]));
      for (let c = 0; c < count; c++) {
        const value = y(floor[c] + group.held[this.columns[c]]);
        context.lineTo(x(c), value);
        context.lineTo(x(c + 1), value);
      }
      for (let c = count - 1; c >= 0; c--) {
        context.lineTo(x(c + 1), y(floor[c]));
        context.lineTo(x(c), y(floor[c]));
      }
      context.fill();
      for (let c = 0; c < count; c++) floor[c] += group.held[this.columns[c]];
    }
    this.drawMarks(context, { x: (e) => LEFT + (e * this.wide) / (EVENTS + 1), top, tall, width, line, quiet });
    const here = LEFT + ((this.at + 0.5) * this.wide) / (EVENTS + 1);
    context.strokeStyle = style("--text");
    context.setLineDash([3, 2]);
    context.beginPath();
    context.moveTo(here, top);
    context.lineTo(here, top + tall);
    context.stroke();
    this.tell();
  }

  drawAxes(context, { most, y, width, line, quiet }) {
    const step = niceStep(most);
    context.textAlign = "right";
    for (let n = 0; n <= 1.04 * most; n += step) {
      context.fillStyle = quiet;
      context.fillText(bytes(n), LEFT - 6, y(n) + 4);
      context.strokeStyle = line;
      context.beginPath();
      context.moveTo(LEFT, y(n));
      context.lineTo(width, y(n));
      context.stroke();
    }
  }

  drawMarks(context, { x, top, tall, width, line, quiet }) {
    context.textAlign = "left";
    let free = 0;
    data.marks.forEach(([at, step, phase], i) => {
      const left = x(at - 1);
      const right = i + 1 < data.marks.length ? x(data.marks[i + 1][0] - 1) : width;
      context.strokeStyle = quiet;
      context.globalAlpha = 0.5;
      context.beginPath();
      context.moveTo(left, top);
      context.lineTo(left, top + tall);
      context.stroke();
      context.globalAlpha = 1;
      const text = phase === "forward" ? `${step}: forward` : phase;
      const room = context.measureText(text).width + 6;
      if (left + 3 < free || right - left < room || phase === "between") return;
      context.fillStyle = quiet;
      context.fillText(text, left + 3, top - 8);
      free = left + room;
    });
    context.fillStyle = quiet;
    context.fillText("event 0", LEFT, top + tall + 15);
    context.textAlign = "right";
    context.fillText(EVENTS.toLocaleString("en"), width - 4, top + tall + 15);
  }

  tell() {
    const e = this.at;
    this.legend.replaceChildren(...this.groups.filter((g) => g.held.some((n) => n > 0)).map((g) => {
      const swatch = h("i", { "aria-hidden": "true" });
      swatch.style.background = g.colour;
      return h("li", {}, swatch, h("span", {}, g.name), h("b", {}, bytes(g.held[e])));
    }));
    const phase = phaseAt(e);
    const where = e === PEAK ? "the peak" : `event ${e.toLocaleString("en")}`;
    this.moment.textContent = `What holds most at ${where}${phase ? ` (${phase})` : ""}: ${bytes(everything[e])} in all`;
    const alike = new Map(); // of one holder and stack
    for (const i of size.keys()) {
      if (!alive(i, e)) continue;
      const key = `${holder[i]} ${stack[i]} ${start[i] === 0}`;
      const found = alike.get(key) ?? alike.set(key, { of: i, sum: 0, count: 0 }).get(key);
      found.sum += size[i];
      found.count += 1;
    }
    const largest = [...alike.values()].sort((a, b) => b.sum - a.sum).slice(0, 12);
    this.table.replaceChildren(...largest.map(({ of: i, sum, count }) => {
      const name = data.holders[holder[i]];
      const swatch = h("i", { "aria-hidden": "true" });
      swatch.style.background = COLOURS[name];
      const frames = framesOf(stack[i]);
      const summary = h("code", {}, lineOf(stack[i], start[i]));
      const where = frames.length > 1 ? h("details", {}, h("summary", {}, summary), h("ol", {}, ...frames.map((f) => h("li", {}, `${f[0]}:${f[1]} ${f[2]}`)))) : summary;
      return h("tr", {}, h("td", { class: "number" }, bytes(sum)), h("td", { class: "number" }, count.toLocaleString("en")), h("td", { class: "holder" }, swatch, wordOf(name)), h("td", {}, where));
    }));
  }
}

// -- the map of the segments -----------------------------------------------------------------------------------------

class SegmentMap {
  constructor() {
    const order = [...data.segments].sort((a, b) => b[0] - a[0]);
    this.pieces = [];
    let at = 0;
    for (const segment of order) {
      for (const block of segment[4]) {
        this.pieces.push({ at, block, segment, split: segment[4].length > 1 });
        at += block[0];
      }
    }
    this.total = at;
    this.starts = order.reduce((found, segment) => [...found, found.at(-1) + segment[0]], [0]);
    this.rows = Math.max(1, Math.min(24, Math.ceil(this.total / 16e6)));
    this.canvas = canvasOf("Map of the allocator's segments: what is in use, and what is free between", this.rows * 14 + 2);
    const { reserved, allocated, rounding, free_whole, free_pieces, largest_free } = data.totals;
    const share = reserved ? ` (${((100 * free_pieces) / reserved).toFixed(1)} %)` : "";
    const facts = [["reserved", bytes(reserved)], ["allocated", bytes(allocated)], ["of it, rounding up", bytes(rounding)], ["free, whole segments", bytes(free_whole)], ["free, in pieces", `${bytes(free_pieces)}${share}`], ["largest free block", bytes(largest_free)], ["segments", data.segments.length.toLocaleString("en")]];
    const list = h("dl", { class: "facts" }, ...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
    const key = [...new Set(this.pieces.map(({ block }) => block[3]).filter((k) => k >= 0))].sort((a, b) => a - b).map((k) => [wordOf(data.holders[k]), COLOURS[data.holders[k]]]);
    const swatch = ([name, colour]) => {
      const box = h("i", { "aria-hidden": "true" });
      box.style.background = colour;
      return h("li", {}, box, h("span", {}, name));
    };
    const legend = h("ul", { class: "legend" }, ...[...key, ["free, in a piece", "var(--piece)"], ["free, a whole segment", "var(--free)"]].map(swatch));
    const words = "in the order of size, a gap between two; what is free in pieces takes only what fits between";
    this.element = h("section", {}, h("header", {}, h("h2", {}, "Segments at the end"), h("span", { class: "quiet" }, words)), list, this.canvas, legend);
    this.canvas.addEventListener("mousemove", (event) => this.hover(event));
    this.canvas.addEventListener("mouseleave", hideTip);
  }

  draw() {
    this.width = this.canvas.clientWidth;
    const context = contextOf(this.canvas);
    const scale = this.width / (this.total / this.rows);
    const fill = (from, to, colour) => {
      context.fillStyle = colour;
      for (let row = Math.floor((from * scale) / this.width); row <= Math.min(this.rows - 1, Math.floor((to * scale) / this.width)); row++) {
        const left = Math.max(0, from * scale - row * this.width);
        const right = Math.min(this.width, to * scale - row * this.width);
        if (right > left) context.fillRect(left, row * 14, right - left, 12);
      }
    };
    for (const { at, block, split } of this.pieces) {
      const free = block[2] === 2;
      fill(at, at + block[0], free ? style(split ? "--piece" : "--free") : block[2] === 1 ? REST : COLOURS[data.holders[Math.max(0, block[3])]]);
    }
    for (const at of this.starts) fill(at - 0.75 / scale, at + 0.75 / scale, style("--back"));
  }

  hover(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / 14);
    const at = ((row + (event.clientX - box.left) / this.width) * this.total) / this.rows;
    const piece = this.pieces.find((p) => p.at <= at && at < p.at + p.block[0]);
    if (!piece) return hideTip();
    const { block, segment, split } = piece;
    const free = block[2] === 2;
    const what = free ? `${bytes(block[0])} free${split ? ", in a piece" : ""}` : `${bytes(block[0])} ${block[3] >= 0 ? wordOf(data.holders[block[3]]) : "waiting to be free"}`;
    const asked = !free && block[0] > block[1] ? `${bytes(block[0] - block[1])} of it added by rounding up` : null;
    const pool = `in a segment of ${bytes(segment[0])} for ${segment[2]} blocks${segment[3] ? ", of captured graphs" : ""}${segment[1] ? `, stream ${segment[1]}` : ""}`;
    showTip(event, [what, asked, free || block[4] < 0 ? null : lineOf(block[4], 0), pool].filter(Boolean));
  }
}

// -- the page --------------------------------------------------------------------------------------------------------

const steps = data.first !== undefined && data.recorded ? (data.first < data.step ? `steps ${data.first} to ${data.step}` : `step ${data.step}`) : data.step !== undefined ? `step ${data.step}` : "";
const title = ["Memory", data.rank !== undefined ? `of rank ${data.rank}` : "", steps ? `, ${steps}` : ""].join(" ").replace(" ,", ",");
const facts = [data.device, data.total ? `${bytes(data.total)} in all` : null, data.peak ? `peak ${bytes(data.peak)}` : null].filter(Boolean).join(" · ");
document.title = title;
page.append(h("h1", {}, title), h("p", { class: "quiet" }, facts), tip);
if (data.reason === "out of memory") {
  const refused = data.refused.at(-1);
  page.append(h("p", { class: "bad" }, `Memory ran out${refused ? `: ${bytes(refused[1])} more were asked for` : ""}. This is what held it then.`));
}
const drawn = [];
if (EVENTS > 0) {
  const timeline = new Timeline();
  page.append(...timeline.elements);
  drawn.push(timeline);
} else {
  page.append(h("p", { class: "quiet" }, "No history was being recorded: probes.memory.snapshot_steps records one from the start."));
}
if (data.segments.length) {
  const map = new SegmentMap();
  page.append(map.element);
  drawn.push(map);
}
const draw = () => drawn.forEach((part) => part.draw());
draw();
window.addEventListener("resize", draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
