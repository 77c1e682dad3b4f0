// The Inspector's drawings: each method of View named after a card draws it from the store.

const HEAT = { type: "heatmap", colorscale: SCALE, showscale: false, hoverinfo: "none", zsmooth: false, hoverongaps: false };
const POINTER = { hovermode: "closest", uirevision: "kept" };

Object.assign(View.prototype, {
  async loss(colours) {
    const { store } = this;
    const card = this.cards.loss;
    const metrics = store.facts.get("metrics") ?? [];
    const loss = store.lines.get("loss");
    if (!loss?.x.length) return card.wait();
    const ink = colours.ink;
    const data = [];
    const entries = [];
    const line = { x: loss.x, type: "scatter", mode: "lines", name: "loss" };
    const enough = loss.y.length > 20;
    data.push({ ...line, y: loss.y, line: { color: enough ? faded(ink[0], 0.28) : ink[0], width: enough ? 1 : 1.75 }, hoverinfo: enough ? "skip" : "all" });
    if (enough) data.push({ ...line, y: smoothed(loss.y, 0.85), line: { color: ink[0], width: 2 } });
    entries.push({ colour: ink[0], label: "loss", value: compact(lastOf({ y: smoothed(loss.y, enough ? 0.85 : 0) })) });
    let right = false;
    metrics.forEach((metric, i) => {
      const held = store.lines.get(`metric:${metric}`);
      if (!held) return;
      const isLoss = metric.includes("loss");
      right = right || !isLoss;
      const colour = ink[(i + 1) % ink.length];
      const label = metric === "loss" ? "held-out loss" : metric;
      const mode = held.x.length > 60 ? "lines" : "lines+markers";
      data.push({ type: "scatter", mode, x: held.x, y: held.y, name: plain(label), yaxis: isLoss ? "y" : "y2", line: { color: colour, width: 1.5 }, marker: { color: colour, size: 6 } });
      entries.push({ colour, label, value: compact(lastOf(held)) });
    });
    card.aside.replaceChildren(legendOf(entries));
    const layout = layoutOf(colours, { hovermode: "x unified", uirevision: "kept", yaxis: { nticks: 6, rangemode: "normal" }, xaxis: { title: { text: "step" } } });
    if (right) layout.yaxis2 = { ...layout.yaxis, overlaying: "y", side: "right", showgrid: false, rangemode: "normal", nticks: 5, tickformat: ".3~g" };
    return card.react(data, layout);
  },

  async gradients(colours) {
    const card = this.cards.gradients;
    const grid = this.store.grids.get("gradients");
    const names = this.store.facts.get("layers")?.gradients ?? [];
    if (!grid?.x.length) return card.wait();
    let low = Infinity;
    let high = -Infinity;
    let broken = false;
    const z = names.map(() => new Array(grid.x.length));
    const bad = names.map(() => new Array(grid.x.length).fill(null));
    grid.columns.forEach((column, c) => {
      for (let r = 0; r < names.length; r++) {
        const value = column[r];
        if (value === Infinity) {
          bad[r][c] = 1;
          broken = true;
        }
        const log = value > 0 && value < Infinity ? Math.log10(value) : null;
        z[r][c] = log;
        if (log === null) continue;
        if (log < low) low = log;
        if (log > high) high = log;
      }
    });
    if (low > high) [low, high] = [-1, 1];
    low = Math.max(Math.floor(low), Math.ceil(high) - 12);
    high = Math.max(Math.ceil(high), low + 1);
    card.note.replaceChildren(scaleBar(powerOfTen(low), powerOfTen(high)));
    const x = grid.x;
    const data = [{ ...HEAT, x, z, zmin: low, zmax: high }];
    if (broken) data.push({ ...HEAT, x, z: bad, zmin: 0, zmax: 1, colorscale: [[0, "#e5484d"], [1, "#e5484d"]] });
    const ticks = rowTicks(names, card.height - 48, Math.max(10, Math.round(card.width / 24)));
    const layout = layoutOf(colours, { ...POINTER, xaxis: { title: { text: "step" } }, yaxis: { autorange: "reversed", showgrid: false, ...ticks } });
    layout.shapes = this.mark(names.indexOf(this.parameter), colours);
    return card.react(data, layout);
  },

  gradientsTip({ x, y, pointIndex }) {
    const grid = this.store.grids.get("gradients");
    const value = grid.columns[pointIndex[1]]?.[y];
    const names = this.store.facts.get("layers").gradients;
    const text = value === Infinity ? "not finite" : value === 0 ? "no gradient (0)" : `norm ${compact(value)}`;
    return [names[y], `step ${x.toLocaleString("en")}`, text];
  },

  async activations(colours) {
    const card = this.cards.activations;
    const held = this.store.levelsOf.get("activations");
    const names = this.store.facts.get("layers")?.activations ?? [];
    this.sliderRow.hidden = !held || held.of < 2;
    if (!held) return card.wait();
    const z = names.map((_, r) => Array.from(held.bytes.subarray(r * held.bins, (r + 1) * held.bins), (v) => v || null));
    if (document.activeElement !== this.slider || held.at === held.of - 1) {
      this.slider.max = held.of - 1;
      this.slider.value = held.at;
    }
    const latest = held.at === held.of - 1;
    this.sliderText.textContent = `step ${held.step.toLocaleString("en")}${latest ? " (latest)" : ""}`;
    if (held.stats) this.layerStats = held.stats;
    card.note.replaceChildren(scaleBar("few", "many"));
    const ticks = rowTicks(names, card.height - 48, Math.max(10, Math.round(card.width / 24)));
    const edges = this.store.facts.get("edges");
    const xaxis = { title: { text: "value" }, range: [-0.5, held.bins - 0.5], ...valueTicks(edges, held.low, held.bins) };
    const layout = layoutOf(colours, { ...POINTER, xaxis, yaxis: { autorange: "reversed", showgrid: false, ...ticks } });
    layout.uirevision = `${held.low}:${held.bins}`;
    layout.shapes = this.mark(names.indexOf(this.module), colours);
    return card.react([{ ...HEAT, z, zmin: 0, zmax: 255 }], layout);
  },

  activationsTip({ x, y }) {
    const held = this.store.levelsOf.get("activations");
    const edges = this.store.facts.get("edges");
    const names = this.store.facts.get("layers").activations;
    const lines = [names[y], `values ${compact(edges[held.low + x])} to ${compact(edges[held.low + x + 1])}`];
    const stats = this.layerStats;
    if (stats && held.at === held.of - 1) {
      lines.push(`mean ${compact(stats[3 * y])}, deviation ${compact(stats[3 * y + 1])}`, `${(100 * stats[3 * y + 2]).toFixed(1)} % zeros`);
    }
    return lines;
  },

  mark(row, colours) {
    if (row < 0) return [];
    return [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line: { color: colours.dark ? "#fff" : "#111", width: 1 } }];
  },

  async memory(colours) {
    const { store } = this;
    const card = this.cards.memory;
    const { ranks = [], total = 0 } = store.facts.get("memory") ?? {};
    const chosen = store.facts.get("choice")?.rank ?? null;
    const shown = chosen === null ? ranks : ranks.filter((rank) => rank === chosen);
    const of = (rank, field) => store.lines.get(`memory:${rank}:${field}`);
    if (!shown.some((rank) => of(rank, "allocated")?.x.length)) return card.wait();
    const fields = shown.length === 1 ? ["allocated", "reserved", "peak"] : ["allocated"];
    let largest = 0;
    for (const rank of shown) for (const v of of(rank, "peak")?.y ?? []) largest = Math.max(largest, v ?? 0);
    for (const rank of shown) for (const v of of(rank, "reserved")?.y ?? []) largest = Math.max(largest, v ?? 0);
    const unit = bytesUnit(largest);
    const data = [];
    const entries = [];
    const text = (v) => (v === null ? "–" : `${compact(v / unit.size)} ${unit.name}`);
    shown.forEach((rank, i) => {
      fields.forEach((field, f) => {
        const held = of(rank, field);
        const same = field === "reserved" && held?.y.every((v, k) => v === of(rank, "allocated").y[k]);
        if (!held || same) return;
        const colour = colours.ink[(fields.length > 1 ? f : i) % colours.ink.length];
        const dash = field === "peak" ? "dot" : "solid";
        const label = fields.length > 1 ? field : `rank ${rank}`;
        const fill = field === "allocated" && fields.length > 1 ? { fill: "tozeroy", fillcolor: faded(colour, 0.1) } : {};
        data.push({ type: "scatter", mode: "lines", x: held.x, y: held.y.map((v) => (v === null ? null : v / unit.size)), name: label, line: { color: colour, width: 1.5, dash }, ...fill });
        entries.push({ colour, label, value: text(lastOf(held)), dash: dash === "dot" });
      });
    });
    const near = total > 0 && largest > 0.4 * total;
    card.aside.replaceChildren(legendOf(entries), ...(total ? [h("span", { class: "quiet" }, `of ${text(total)}`)] : []));
    const layout = layoutOf(colours, { hovermode: "x unified", uirevision: "kept", xaxis: { title: { text: "step" } }, yaxis: { rangemode: "tozero", title: { text: unit.name }, nticks: 6 } });
    if (near) {
      const line = { color: colours.soft, width: 1, dash: "dash" };
      layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: total / unit.size, y1: total / unit.size, line }];
      layout.yaxis.range = [0, (1.05 * total) / unit.size];
    }
    return card.react(data, layout);
  },

  async norm(colours) {
    const card = this.cards.norm;
    if (this.detail.hidden) return;
    const grid = this.store.grids.get("gradients");
    const row = (this.store.facts.get("layers")?.gradients ?? []).indexOf(this.parameter);
    if (!grid || row < 0) return card.wait();
    const y = grid.columns.map((column) => (column[row] > 0 && column[row] < Infinity ? column[row] : null));
    const data = [{ type: "scatter", mode: y.length < 40 ? "lines+markers" : "lines", x: grid.x, y, name: "norm", line: { color: colours.ink[0], width: 1.5 }, marker: { size: 5 } }];
    const yaxis = { type: "log", exponentformat: "power", nticks: 5 };
    return card.react(data, layoutOf(colours, { hovermode: "x unified", uirevision: this.parameter, xaxis: { title: { text: "step" } }, yaxis }));
  },

  async values(colours) {
    const card = this.cards.values;
    if (this.detail.hidden) return;
    const grid = this.store.grids.get("layer");
    const edges = this.store.facts.get("edges");
    if (!grid?.x.length || !edges) return card.wait();
    let low = grid.rows;
    let high = 0;
    for (const column of grid.columns) {
      for (let r = 0; r < grid.rows; r++) {
        if (!(column[r] > 0)) continue;
        if (r < low) low = r;
        if (r >= high) high = r + 1;
      }
    }
    if (low >= high) return card.wait();
    const z = Array.from({ length: high - low }, () => new Array(grid.x.length).fill(null));
    grid.columns.forEach((column, c) => {
      let most = 0;
      for (let r = low; r < high; r++) most = Math.max(most, column[r]);
      for (let r = low; r < high; r++) if (column[r] > 0) z[r - low][c] = Math.sqrt(column[r] / most);
    });
    const yaxis = { title: { text: "value" }, showgrid: false, range: [-0.5, high - low - 0.5], ...valueTicks(edges, low, high - low) };
    this.shownBins = { low, z };
    return card.react([{ ...HEAT, x: grid.x, z, zmin: 0, zmax: 1 }], layoutOf(colours, { ...POINTER, xaxis: { title: { text: "step" } }, yaxis, uirevision: `${this.module}:${low}:${high}` }));
  },

  listenValues() {
    const { plot } = this.cards.values;
    plot.on("plotly_unhover", () => this.tip.hide());
    plot.on("plotly_hover", ({ points, event }) => {
      const edges = this.store.facts.get("edges");
      const { x, y, z } = points[0];
      const at = this.shownBins.low + y;
      const share = `${Math.round(100 * z * z)} % of the fullest bin`;
      this.tip.show(event, [`values ${compact(edges[at])} to ${compact(edges[at + 1])}`, `step ${x.toLocaleString("en")}`, share]);
    });
  },
});

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = follow(model);
    },
    render({ model, el, signal }) {
      new View({ model, el, signal, store });
    },
  };
};
