// Shared by the live plots; prepended to their modules. Store: the page's copy of the kernel's curves and heat maps.
// Painter: draws what changed, at most four times a second, when it is visible, again when the theme changes.

const FRAME_MS = 250;
const BUDGET_MS = 50; // of a redraw, after which the plots that are left wait for the next

function plotlyReady() {
  const key = "workbenchPlotly";
  if (globalThis.Plotly?.react) return Promise.resolve(globalThis.Plotly);
  if (!globalThis[key]) {
    let resolve;
    const promise = new Promise((done) => (resolve = done));
    globalThis[key] = { promise, resolve, started: false };
  }
  return globalThis[key].promise;
}

class Store {
  constructor() {
    this.lines = new Map();
    this.grids = new Map();
    this.facts = new Map();
    this.levelsOf = new Map();
    this.histories = new Map();
    this.beside = null; // the store of a second run
    this.sequence = null;
    this.listeners = new Set();
  }

  // Returns false when a message is missing; the caller then asks for the whole.
  receive(content, buffers) {
    if (!content.whole && content.sequence !== this.sequence + 1) return false;
    if (content.whole) {
      for (const map of [this.lines, this.grids, this.facts, this.levelsOf, this.histories]) map.clear();
      this.beside = null;
    }
    this.sequence = content.sequence;
    const view = buffers?.[0];
    const bytes = view ? view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength) : new ArrayBuffer(0);
    const values = new Float32Array(bytes);
    const changed = new Set();
    let offset = 0;
    for (const operation of content.operations) {
      const store = operation.run ? (this.beside ??= new Store()) : this;
      offset += store[operation.op](operation, values.subarray(offset));
      changed.add(operation.name);
    }
    for (const listener of this.listeners) listener(changed, content.whole);
    return true;
  }

  line({ name, at, n }, values) {
    const held = this.lines.get(name) ?? { x: [], y: [] };
    held.x.length = held.y.length = at;
    for (let i = 0; i < n; i++) {
      held.x.push(values[i]);
      held.y.push(Number.isFinite(values[n + i]) ? values[n + i] : null);
    }
    this.lines.set(name, held);
    return 2 * n;
  }

  columns({ name, at, n, rows }, values) {
    let grid = this.grids.get(name);
    if (!grid || grid.rows !== rows) this.grids.set(name, (grid = { rows, x: [], columns: [] }));
    grid.x.length = grid.columns.length = at;
    for (let i = 0; i < n; i++) {
      grid.x.push(values[i]);
      grid.columns.push(values.slice(n + i * rows, n + (i + 1) * rows));
    }
    return n * (1 + rows);
  }

  halve({ name, how, keep }) {
    const grid = this.grids.get(name);
    for (let i = 0; i < keep; i++) {
      const a = grid.columns[2 * i];
      const b = grid.columns[2 * i + 1];
      for (let r = 0; r < grid.rows; r++) {
        if (how === "sum") a[r] += b[r];
        else if (Number.isNaN(a[r]) || b[r] > a[r]) a[r] = b[r];
      }
      grid.columns[i] = a;
      grid.x[i] = grid.x[2 * i];
    }
    grid.x.length = grid.columns.length = keep;
    return 0;
  }

  levels({ name, rows, bins, step, at, of, stats }, values) {
    const bytes = bytesOf(values.subarray(stats), rows * bins);
    this.levelsOf.set(name, { rows, bins, step, at, of, bytes, stats: stats ? values.slice(0, stats) : null });
    return stats + Math.ceil((rows * bins) / 4);
  }

  // Distributions of all rows at all steps, as in exported pages: level² × fullest is a count.
  history({ name, n, rows, bins, stats }, values) {
    const parts = [n, n * rows, n * rows * stats];
    const starts = [0, parts[0], parts[0] + parts[1], parts[0] + parts[1] + parts[2]];
    const [x, fullest, told] = parts.map((size, i) => values.subarray(starts[i], starts[i] + size));
    const bytes = bytesOf(values.subarray(starts[3]), n * rows * bins);
    this.histories.set(name, { rows, bins, stats, x, fullest, told, bytes });
    return starts[3] + Math.ceil((n * rows * bins) / 4);
  }

  fact({ name, value }) {
    this.facts.set(name, value);
    return 0;
  }

  forget({ name }) {
    for (const map of [this.lines, this.grids, this.facts, this.levelsOf, this.histories]) map.delete(name);
    return 0;
  }
}

function bytesOf(floats, size) {
  return new Uint8Array(floats.buffer, floats.byteOffset, size);
}

// A message to the kernel; after a restart an old view has nobody to tell.
function tell(model, content) {
  try {
    model.send(content);
  } catch (error) {
    console.debug("[workbench] no kernel to tell", error);
  }
}

// Keeps a model's store up to date; asks the kernel for the whole when this page is new or missed a message.
function follow(model) {
  const store = new Store();
  let asked = 0;
  const ask = () => {
    if (asked && performance.now() - asked < 1000) return;
    asked = performance.now();
    tell(model, { kind: "hello" });
  };
  model.on("msg:custom", (content, buffers) => {
    if (content.kind === "frame" && !store.receive(content, buffers)) ask();
  });
  // The first question may wait behind a running cell; a later one goes to a thread of its own.
  for (const delay of [0, 2000, 6000]) setTimeout(() => store.sequence === null && ask(), delay);
  return store;
}

function theme(el) {
  const style = getComputedStyle(el);
  const of = (name, otherwise) => style.getPropertyValue(name).trim() || otherwise;
  const dark = document.body.dataset.jpThemeLight === "false";
  return {
    dark,
    text: of("--jp-ui-font-color1", dark ? "#ddd" : "#222"),
    soft: of("--jp-ui-font-color2", dark ? "#aaa" : "#666"),
    back: of("--jp-layout-color0", dark ? "#111" : "#fff"),
    raised: of("--jp-layout-color1", dark ? "#212121" : "#fff"),
    line: of("--jp-border-color2", dark ? "#444" : "#ddd"),
    font: of("--jp-ui-font-family", "system-ui, sans-serif"),
    grid: dark ? "rgba(255,255,255,0.08)" : "rgba(0,0,0,0.07)",
    ink: dark
      ? ["#6ea8fe", "#f2b24c", "#5fcfb2", "#f28b82", "#c39bf5", "#9ad06b"]
      : ["#2f6bd8", "#d17a00", "#1a8f76", "#cf4b41", "#7d4fc4", "#54862a"],
  };
}

function faded(colour, alpha) {
  const n = parseInt(colour.slice(1), 16);
  return `rgba(${n >> 16},${(n >> 8) & 255},${n & 255},${alpha})`;
}

function layoutOf(colours, extra = {}) {
  const { xaxis, yaxis, ...rest } = extra;
  const axis = {
    color: colours.soft,
    gridcolor: colours.grid,
    linecolor: colours.line,
    zeroline: false,
    ticks: "",
    tickfont: { size: 11 },
    title: { font: { size: 11 }, standoff: 4 },
    fixedrange: false,
    automargin: true,
  };
  const join = (own) => ({ ...axis, ...own, title: { ...axis.title, ...own?.title } });
  return {
    autosize: true,
    margin: { l: 8, r: 8, t: 8, b: 8 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: colours.font, size: 11, color: colours.soft },
    showlegend: false,
    dragmode: "zoom",
    hoverlabel: {
      bgcolor: colours.raised,
      bordercolor: colours.line,
      font: { family: colours.font, size: 12, color: colours.text },
      align: "left",
      namelength: -1,
    },
    xaxis: join({ showgrid: false, ...xaxis }),
    yaxis: join(yaxis),
    ...rest,
  };
}

const CONFIG = { displayModeBar: false, displaylogo: false, responsive: false, doubleClick: "reset" };

// A gentle exponential average that ignores gaps and starts unbiased.
function smoothed(values, weight) {
  let sum = 0;
  let norm = 0;
  return values.map((v) => {
    if (v === null) return null;
    sum = weight * sum + (1 - weight) * v;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function compact(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumSignificantDigits: 4 });
}

// One plot or several: `draw(name)` draws one; painter.touch(name) asks for it.
class Painter {
  constructor(el, draw, { signal, report, inSight }) {
    this.el = el;
    this.draw = draw;
    this.report = report;
    this.inSight = inSight ?? (() => true); // of a name: what is out of sight waits
    this.dirty = new Set();
    this.all = new Set();
    this.times = [];
    this.last = 0;
    this.cost = 0;
    this.timer = null;
    this.visible = true;
    this.busy = false;
    const again = () => {
      this.whole = true;
      this.touch(...this.all);
    };
    const watch = new MutationObserver(again);
    watch.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-light", "data-jp-theme-name"] });
    const resize = new ResizeObserver(again);
    resize.observe(el);
    const sight = new IntersectionObserver(([entry]) => {
      this.visible = entry.isIntersecting;
      if (this.visible) this.schedule();
    });
    sight.observe(el);
    // A theme's colours may come after the mark that it has changed: look again now and then.
    const reporter = setInterval(() => {
      this.flushReport();
      if (this.painted && this.painted !== this.colours()) again();
    }, 2000);
    signal?.addEventListener("abort", () => {
      for (const observer of [watch, resize, sight]) observer.disconnect();
      clearInterval(reporter);
      clearTimeout(this.timer);
      this.dirty.clear();
      this.gone = true;
    });
  }

  touch(...names) {
    for (const name of names) {
      this.dirty.add(name);
      this.all.add(name);
    }
    this.schedule();
  }

  colours() {
    return JSON.stringify(theme(this.el));
  }

  schedule() {
    if (this.timer !== null || this.busy || !this.visible || this.gone || !this.due().length) return;
    // A slow page draws less often: at most a third of its time goes into drawing.
    const wait = Math.max(0, this.last + Math.max(FRAME_MS, this.whole ? 0 : 3 * this.cost) - performance.now());
    this.timer = setTimeout(() => requestAnimationFrame(() => this.paint()), wait);
  }

  due() {
    return [...this.dirty].filter((name) => this.inSight(name));
  }

  async paint() {
    this.timer = null;
    if (this.gone || !this.el.isConnected || this.el.clientWidth === 0) return;
    this.busy = true;
    await plotlyReady();
    const colours = this.colours();
    if (this.painted && this.painted !== colours) {
      for (const name of this.all) this.dirty.add(name);
      this.whole = true;
    }
    this.painted = colours;
    const names = this.due();
    const began = performance.now();
    this.last = began;
    try {
      for (const name of names) {
        this.dirty.delete(name); // what changes meanwhile is drawn again, after those that still wait
        await this.draw(name);
        if (performance.now() - began > BUDGET_MS && !this.whole) break;
      }
      this.whole = false; // a new theme or width is drawn at once
    } catch (error) {
      console.error("[workbench]", error);
    }
    this.cost = performance.now() - began;
    if (names.length) this.times.push(this.cost);
    this.busy = false;
    this.schedule();
  }

  flushReport() {
    if (!this.times.length || !this.report) return;
    this.report(this.times.map((t) => Math.round(t * 10) / 10));
    this.times = [];
  }
}

// Range of an axis of shares, which end at 1 however few points there are to scale by; undefined for other values.
function rangeOfShares(values) {
  const known = values.filter((value) => value !== null);
  if (!known.length || known.some((value) => !(value >= 0 && value <= 1))) return undefined;
  return [Math.max(0, Math.min(...known) - 0.1), 1.02];
}
