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
    const weight = 1 - 1 / Math.min(8, Math.max(2, loss.y.length / 40)); // an average over a fortieth of the run hardly lags
    const smooth = enough ? smoothed(loss.y, weight) : loss.y;
    data.push({ ...line, y: loss.y, line: { color: enough ? faded(ink[0], 0.28) : ink[0], width: enough ? 1 : 1.75 }, hoverinfo: enough ? "skip" : "all" });
    if (enough) data.push({ ...line, y: smooth, line: { color: ink[0], width: 2 } });
    const latest = loss.y.at(-1) === null ? "not finite" : compact(lastOf({ y: smooth }));
    entries.push({ colour: ink[0], label: "loss", value: latest });
    const right = [];
    metrics.forEach((metric, i) => {
      const held = store.lines.get(`metric:${metric}`);
      if (!held) return;
      const isLoss = metric.includes("loss");
      if (!isLoss) right.push(...held.y);
      const colour = ink[(i + 1) % ink.length];
      const label = ["loss", "val_loss"].includes(metric) ? "held-out loss" : metric;
      const mode = held.x.length > 60 ? "lines" : "lines+markers";
      data.push({ type: "scatter", mode, x: held.x, y: held.y, name: plain(label), yaxis: isLoss ? "y" : "y2", line: { color: colour, width: 1.5 }, marker: { color: colour, size: 6 } });
      entries.push({ colour, label, value: compact(lastOf(held)) });
    });
    card.aside.replaceChildren(legendOf(entries));
    const layout = layoutOf(colours, { hovermode: "x unified", uirevision: "kept", yaxis: { nticks: 6, rangemode: "normal" }, xaxis: { title: { text: "step" } } });
    if (right.length) {
      layout.yaxis2 = { ...layout.yaxis, overlaying: "y", side: "right", showgrid: false, rangemode: "normal", tickmode: "auto", nticks: 6 };
      layout.yaxis2.range = rangeOfShares(right);
    }
    return card.react(data, layout);
  },

  async gradients(colours) {
    const card = this.cards.gradients;
    const grid = this.store.grids.get("gradients");
    const names = this.store.facts.get("layers")?.gradients ?? [];
    if (!grid?.x.length) return card.wait();
    let low = Infinity;
    let high = -Infinity;
    let bad = null;
    const empty = () => names.map(() => new Float32Array(grid.x.length).fill(NaN));
    const z = empty();
    grid.columns.forEach((column, c) => {
      for (let r = 0; r < names.length; r++) {
        const value = column[r];
        if (value === Infinity) (bad ??= empty())[r][c] = 1;
        if (!(value > 0 && value < Infinity)) continue;
        const log = (z[r][c] = Math.log10(value));
        if (log < low) low = log;
        if (log > high) high = log;
      }
    });
    if (low > high) [low, high] = [-1, 1];
    low = Math.max(Math.floor(low), Math.ceil(high) - 12);
    high = Math.max(Math.ceil(high), low + 1);
    const key = bad ? h("span", { class: "wi-broken" }, h("i", { "aria-hidden": "true" }), "not finite") : null;
    card.note.replaceChildren(...[key, scaleBar(powerOfTen(low), powerOfTen(high))].filter(Boolean));
    const x = grid.x;
    const data = [{ ...HEAT, x, z, zmin: low, zmax: high }];
    if (bad) data.push({ ...HEAT, x, z: bad, zmin: 0, zmax: 1, colorscale: [[0, "#e5484d"], [1, "#e5484d"]] });
    const ticks = rowTicks(names, card.height - 48, Math.max(10, Math.round(card.width / 18)));
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
    const z = names.map((_, r) => held.bytes.subarray(r * held.bins, (r + 1) * held.bins));
    if (document.activeElement !== this.slider || held.at === held.of - 1) {
      this.slider.max = held.of - 1;
      this.slider.value = held.at;
    }
    const latest = held.at === held.of - 1;
    this.sliderText.textContent = `step ${held.step.toLocaleString("en")}${latest ? " (latest)" : ""}`;
    if (held.stats) this.layerStats = held.stats;
    const scale = densityScale(colours);
    card.note.replaceChildren(scaleBar("few", "many", scale));
    const ticks = rowTicks(names, card.height - 48, Math.max(10, Math.round(card.width / 18)));
    const xaxis = { title: { text: "value" }, range: [-0.5, held.bins - 0.5], ...valueTicks(this.store.facts.get("bins")) };
    const layout = layoutOf(colours, { ...POINTER, xaxis, yaxis: { autorange: "reversed", showgrid: false, ...ticks } });
    layout.uirevision = `${held.bins}`;
    layout.shapes = this.mark(names.indexOf(this.module), colours);
    return card.react([{ ...HEAT, z, zmin: 0, zmax: 255, colorscale: scaleOf(scale) }], layout);
  },

  activationsTip({ x, y }) {
    const held = this.store.levelsOf.get("activations");
    const edges = this.store.facts.get("bins");
    const names = this.store.facts.get("layers").activations;
    const lines = [names[y], `values ${compact(edges[x])} to ${compact(edges[x + 1])}`];
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

  async communication(colours) {
    const { store } = this;
    const card = this.cards.communication;
    const { ranks = [], exposed = null, link = "", hosts = 1, network = null, bandwidth = null } = store.facts.get("times") ?? {};
    card.element.hidden = ranks.length < 2; // one rank waits for no other
    if (card.element.hidden) return;
    const chosen = store.facts.get("choice")?.rank ?? null;
    const shown = chosen === null ? ranks : ranks.filter((rank) => rank === chosen);
    const of = (rank, field) => store.lines.get(`time:${rank}:${field}`);
    if (!shown.some((rank) => of(rank, "busy")?.x.length)) return card.wait();
    const data = [];
    const entries = [];
    const draw = (held, label, colour, dash) => {
      if (!held) return;
      const y = held.y.map((v) => (v === null ? null : 1000 * v));
      data.push({ type: "scatter", mode: "lines", x: held.x, y, name: label, line: { color: colour, width: 1.5, dash: dash ? "dot" : "solid" } });
      if (entries.length < 9) entries.push({ colour, label, value: `${compact(lastOf({ y }))} ms`, dash });
    };
    const { ink } = colours;
    shown.forEach((rank, i) => draw(of(rank, "busy"), shown.length > 1 ? `rank ${rank}` : "own work", ink[i % ink.length]));
    if (shown.length === 1) draw(of(shown[0], "waited"), "waiting for samples", ink[1]);
    draw(of(shown[0], "step"), "with waits for other ranks", colours.soft, true);
    card.aside.replaceChildren(legendOf(entries));
    const rate = bandwidth ? `, ${compact(bandwidth / 1e9)} GB/s in an all-reduce` : "";
    const wires = hosts > 1 && network ? `; network ${compact(network)} Gb/s between ${hosts} hosts` : "";
    const share = exposed === null ? "" : `Exposed communication: ${(100 * exposed).toFixed(exposed < 0.1 ? 1 : 0)} % of a step. `;
    this.timesText.hidden = false;
    this.timesText.textContent = `${share}Ranks are linked by ${link}${rate}${wires}.`;
    const yaxis = { rangemode: "tozero", title: { text: "ms" }, nticks: 5 };
    return card.react(data, layoutOf(colours, { hovermode: "x unified", uirevision: "kept", xaxis: { title: { text: "step" } }, yaxis }));
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
    const shown = folded(grid.columns, edges);
    const most = grid.columns.map((_, c) => Math.max(1, ...shown.counts.map((row) => row[c])));
    const z = shown.counts.map((row) => row.map((count, c) => Math.sqrt(count / most[c])));
    const yaxis = { title: { text: "value" }, showgrid: false, range: [-0.5, z.length - 0.5], ...valueTicks(shown.edges) };
    const layout = layoutOf(colours, { ...POINTER, xaxis: { title: { text: "step" } }, yaxis, uirevision: `${this.module}:${z.length}` });
    this.shownEdges = shown.edges;
    return card.react([{ ...HEAT, x: grid.x, z, zmin: 0, zmax: 1, colorscale: scaleOf(densityScale(colours)) }], layout);
  },

  listenValues() {
    const { plot } = this.cards.values;
    plot.on("plotly_unhover", () => this.tip.hide());
    plot.on("plotly_hover", ({ points, event }) => {
      const { x, y, z } = points[0];
      const edges = this.shownEdges;
      const share = `${Math.round(100 * z * z)} % of the fullest bin`;
      this.tip.show(event, [`values ${compact(edges[y])} to ${compact(edges[y + 1])}`, `step ${x.toLocaleString("en")}`, share]);
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
