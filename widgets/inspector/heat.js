// The Inspector's heat maps: gradients by layer and step, distributions by layer, and the history of one layer.

const HEAT = { type: "heatmap", showscale: false, hoverinfo: "none", zsmooth: false, hoverongaps: false };
const HEAT_MARGIN = { l: 0, r: 12, t: 8, b: 34 };
const RIDGES = 24;

Object.assign(View.prototype, {
  // Rows of a card, its height, and its labels, once drawn.
  rowsOf(kind, names) {
    const card = this.cards[kind];
    const byBlock = names.length > MANY && !this.byLayer[kind];
    const rows = rowsOf(names, { byBlock, open: this.opened[kind] });
    card.resize(card.wide ? Math.max(300, Math.min(720, 15 * rows.length + 48)) : HEIGHT);
    card.rows = rows;
    return rows;
  },

  heatLayout(kind, rows, colours, xaxis) {
    const width = this.labels[kind].width(rows);
    const margin = { ...HEAT_MARGIN, l: width };
    const yaxis = { range: [rows.length - 0.5, -0.5], showgrid: false, showticklabels: false, automargin: false, fixedrange: true };
    const layout = layoutOf(colours, { hovermode: "closest", margin, xaxis: { automargin: false, ...xaxis }, yaxis });
    const chosen = kind === "gradients" ? this.parameter : this.module;
    layout.shapes = this.outline(rows.findIndex((row) => row.name === chosen && !row.block), colours);
    const place = { top: margin.t, height: this.cards[kind].height - margin.t - margin.b, width, chosen };
    return { layout, label: () => this.labels[kind].draw(rows, place) };
  },

  outline(row, colours) {
    if (row < 0) return [];
    return [{ type: "rect", xref: "paper", x0: 0, x1: 1, y0: row - 0.5, y1: row + 0.5, line: { color: colours.text, width: 1 } }];
  },

  // The switches of a heat map: by blocks or layers where there are many, whose run where there are two.
  switchesOf(kind, names, runs) {
    const card = this.cards[kind];
    const rows = [];
    const whose = [];
    const again = () => this.painter.touch(kind);
    if (names.length > MANY) {
      const choose = (value) => {
        this.byLayer[kind] = value === "layers";
        again();
      };
      rows.push(segmented("Rows", [["blocks", "blocks"], ["layers", "layers"]], this.byLayer[kind] ? "layers" : "blocks", choose));
    }
    if (this.store.beside) {
      const choose = (value) => {
        this.shownRun[kind] = value;
        again();
      };
      whose.push(segmented("Whose readings", runs, this.shownRun[kind], choose));
    }
    const key = JSON.stringify([names.length, Boolean(this.store.beside), runs]);
    if (card.switchKey === key) return;
    card.switchKey = key;
    card.switches.replaceChildren(...whose);
    card.rowSwitch.replaceChildren(...rows);
  },

  gridOf(store) {
    return store?.grids.get(this.quantity.name === "norm" ? "gradients" : `gradients:${this.quantity.name}`);
  },

  async gradients(colours) {
    const card = this.cards.gradients;
    const { log, block } = this.quantity;
    const whose = this.store.beside ? this.shownRun.gradients : "this";
    const from = whose === "other" ? this.store.beside : this.store;
    const grid = this.gridOf(from);
    const names = from.facts.get("layers")?.gradients ?? [];
    if (!grid?.x.length || !names.length) {
      this.labels.gradients.clear();
      return card.wait();
    }
    const rows = this.rowsOf("gradients", names);
    const other = whose === "ratio" ? this.gridOf(this.store.beside) : null;
    this.switchesOf("gradients", names, [["this", "this"], ["other", "other"], ["ratio", log ? "ratio" : "change", "this run against the other"]]);
    const values = rows.map(({ members }) => Float32Array.from(grid.columns, (column) => rowValue(column, members, block)));
    card.shown = { x: grid.x, values, other: other && this.besideValues(rows, grid, other) };
    const z = values.map((row, r) => row.map((value, c) => this.shade(value, card.shown.other?.[r][c], log, whose)));
    const [low, high, words] = this.shadeRange(z, log, whose);
    const colourscale = whose === "ratio" ? ratioScale(colours) : VIRIDIS;
    const bad = values.map((row) => row.map((v) => (v === Infinity ? 1 : NaN)));
    const broken = bad.some((row) => row.some((v) => v === 1));
    const key = broken ? h("span", { class: "wi-broken" }, h("i", { "aria-hidden": "true" }), "not finite") : null;
    card.note.replaceChildren(...[scaleBar(words[0], words[1], colourscale), key].filter(Boolean));
    const data = [{ ...HEAT, x: grid.x, z, zmin: low, zmax: high, colorscale: scaleOf(colourscale) }];
    if (broken) {
      data.push({ ...HEAT, x: grid.x, z: bad, zmin: 0, zmax: 1, colorscale: [[0, BROKEN], [1, BROKEN]] });
      // By place too, not by colour alone: a mark above each first column of a stretch.
      const first = grid.x.filter((_, c) => bad.some((row) => row[c] === 1) && !(c && bad.some((row) => row[c - 1] === 1)));
      const marker = { symbol: "triangle-down", size: 8, color: BROKEN };
      data.push({ type: "scatter", mode: "markers", x: first, y: first.map(() => -0.5), marker, cliponaxis: false, hoverinfo: "skip" });
    }
    const { layout, label } = this.heatLayout("gradients", rows, colours, { title: { text: "step" } });
    label();
    return card.react(data, layout);
  },

  // The other run's values of these rows, at the last of its steps that is not past each column's; layers are matched by name.
  besideValues(rows, grid, other) {
    const known = new Map((this.store.beside.facts.get("layers")?.gradients ?? []).map((name, index) => [name, index]));
    const mine = this.store.facts.get("layers").gradients;
    const columns = grid.x.map((step) => other.columns[indexAt(other.x, step)]);
    const end = other.x.at(-1) + (other.x.at(-1) - (other.x.at(-2) ?? 0));
    return rows.map(({ members }) => {
      const matched = members.map((index) => known.get(mine[index]));
      if (matched.some((index) => index === undefined)) return columns.map(() => NaN);
      return columns.map((column, c) => (column && grid.x[c] <= end ? rowValue(column, matched, this.quantity.block) : NaN));
    });
  },

  // What a cell is coloured by; not a number where it is blank.
  shade(value, other, log, whose) {
    if (value === Infinity) return NaN;
    if (whose === "ratio") return log ? (value > 0 && other > 0 && other < Infinity ? Math.log10(value / other) : NaN) : value - other;
    return log ? (value > 0 ? Math.log10(value) : NaN) : value;
  },

  shadeRange(z, log, whose) {
    let low = Infinity;
    let high = -Infinity;
    for (const row of z) {
      for (const v of row) {
        if (v < low) low = v;
        if (v > high) high = v;
      }
    }
    if (low > high) [low, high] = [0, 0];
    const percent = (v) => `${compact(100 * v)} %`;
    if (whose === "ratio") {
      const most = Math.max(-low, high);
      const reach = log ? Math.max(0.3, Math.ceil(most * 10) / 10) : Math.max(0.01, most);
      const words = log ? [`÷ ${compact(+(10 ** reach).toPrecision(2))}`, `× ${compact(+(10 ** reach).toPrecision(2))}`] : [`−${percent(reach)}`, `+${percent(reach)}`];
      return [-reach, reach, words];
    }
    if (!log) {
      const top = [0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5].find((v) => high <= v) ?? 1;
      return [0, top, ["0", percent(top)]];
    }
    low = Math.max(Math.floor(low), Math.ceil(high) - 12);
    high = Math.max(Math.ceil(high), low + 1);
    return [low, high, [powerText(10 ** low), powerText(10 ** high)]];
  },

  gradientsTip({ x, y, pointIndex }) {
    const { shown, rows } = this.cards.gradients;
    const value = shown.values[y][pointIndex[1]];
    const { log, label } = this.quantity;
    const text = (v) => (v === Infinity ? "not finite" : Number.isNaN(v) ? "no reading" : log ? compact(v) : `${compact(100 * v)} %`);
    const row = rows[y];
    const lines = [row.name, `step ${x.toLocaleString("en")}`, `${label.toLowerCase()} ${text(value)}`];
    if (row.block) lines.splice(1, 0, `${row.members.length} parameters, ${{ norm: "as one", max: "the largest", mean: "their mean" }[this.quantity.block]}`);
    if (shown.other) {
      const other = shown.other[y][pointIndex[1]];
      lines.push(`other run ${text(other)}${log && value > 0 && other > 0 ? `: × ${compact(value / other)}` : ""}`);
    }
    return lines;
  },

  async activations(colours) {
    const card = this.cards.activations;
    const whose = this.store.beside ? this.shownRun.activations : "this";
    const from = whose === "other" ? this.store.beside : this.store;
    const held = from.levelsOf.get("activations");
    const names = from.facts.get("layers")?.activations ?? [];
    const edges = from.facts.get("edges");
    if (!held || !edges || !names.length) {
      this.labels.activations.clear();
      this.atStep.textContent = "";
      return card.wait();
    }
    this.atStep.textContent = `at step ${held.step.toLocaleString("en")}`;
    this.switchesOf("activations", names, [["this", "this"], ["other", "other"]]);
    const rows = this.rowsOf("activations", names);
    const counts = rows.map(({ members }) => sharesOf(members.map((r) => held.bytes.subarray(r * held.bins, (r + 1) * held.bins))));
    const bins = shownBins(counts, held.bins);
    const z = counts.map((row) => rootsOf(foldedRow(row, bins)));
    card.shown = { held, edges: foldedEdges(edges, bins) };
    const scale = densityScale(colours);
    card.note.replaceChildren(scaleBar("few", "many", scale));
    const xaxis = { title: { text: "value" }, range: [-0.5, z[0].length - 0.5], showgrid: false, ...valueTicks(card.shown.edges) };
    const { layout, label } = this.heatLayout("activations", rows, colours, xaxis);
    layout.uirevision = `${z[0].length}`;
    label();
    return card.react([{ ...HEAT, z, zmin: 0, zmax: 1, colorscale: scaleOf(scale) }], layout);
  },

  activationsTip({ x, y, z }) {
    const { shown, rows } = this.cards.activations;
    const row = rows[y];
    const lines = [row.name, `values ${compact(shown.edges[x])} to ${compact(shown.edges[x + 1])}`, `${Math.round(100 * z * z)} % of the fullest bin`];
    const { stats, rows: layers } = shown.held;
    if (!stats || row.block) return lines;
    const each = stats.length / layers;
    const [mean, deviation, zeros, dead, saturated] = stats.subarray(each * row.members[0], each * (row.members[0] + 1));
    if (!Number.isFinite(mean)) return lines;
    const percent = (v, what) => (Number.isFinite(v) ? [`${(100 * v).toFixed(1)} % ${what}`] : []);
    return [...lines, `mean ${compact(mean)}, deviation ${compact(deviation)}`, ...percent(zeros, "zeros"), ...percent(dead, "of channels dead"), ...percent(saturated, "of channels saturated")];
  },

  listenHeat(kind) {
    const { plot } = this.cards[kind];
    plot.on("plotly_click", ({ points }) => this.cards[kind].rows[points[0].y] && this.press(kind, this.cards[kind].rows[points[0].y]));
    plot.on("plotly_unhover", () => this.tip.hide());
    plot.on("plotly_hover", ({ points, event }) => points[0].z !== undefined && this.tip.show(event, this[`${kind}Tip`](points[0])));
  },

  // -- one layer -----------------------------------------------------------------------------------------------------

  async norm(colours) {
    const card = this.cards.norm;
    if (this.detail.hidden) return;
    const data = [];
    const entries = [];
    const { log, label } = this.quantity;
    const known = [];
    for (const [store, other] of [[this.store, false], [this.store.beside, true]]) {
      const grid = this.gridOf(store);
      const row = (store?.facts.get("layers")?.gradients ?? []).indexOf(this.parameter);
      if (!grid || row < 0) continue;
      const y = grid.columns.map((column) => (column[row] < Infinity && (!log || column[row] > 0) ? column[row] : null));
      known.push(...y.filter((v) => v !== null));
      const colour = colours.ink[0];
      const mode = y.length < 40 ? "lines+markers" : "lines";
      data.push(lineOf({ x: grid.x, y }, label, colour, { mode, line: { color: colour, width: 1.5, dash: other ? "dash" : "solid" }, marker: { size: 5 } }));
      entries.push({ colour, label: other ? "other" : label.toLowerCase(), dash: other, line: { x: grid.x, y }, text: (v) => (log || v === null ? compact(v) : `${compact(100 * v)} %`) });
    }
    if (!known.length) return card.wait();
    card.legend(entries);
    const yaxis = log ? logTicks(Math.min(...known), Math.max(...known)) : { rangemode: "tozero", tickformat: ".1%" };
    return card.react(data, lineLayout(colours, { yaxis }));
  },

  async values(colours) {
    const card = this.cards.values;
    if (this.detail.hidden) return;
    const grid = this.store.grids.get("layer");
    const edges = this.store.facts.get("edges");
    if (!grid?.x.length || !edges) return card.wait();
    const sum = new Float64Array(edges.length - 1);
    for (const column of grid.columns) for (let i = 0; i < sum.length; i++) sum[i] += column[i] || 0;
    const bins = shownBins([sum], sum.length);
    const counts = grid.columns.map((column) => foldedRow(column, bins));
    card.shown = { edges: foldedEdges(edges, bins), x: grid.x };
    if (card.timed === Boolean(this.ridges)) card.wait(); // another kind of plot: from the start
    card.timed = !this.ridges;
    return this.ridges ? this.drawRidges(card, counts, colours) : this.drawValues(card, counts, colours);
  },

  drawValues(card, counts, colours) {
    const shares = counts.map(rootsOf);
    const z = card.shown.edges.slice(1).map((_, bin) => shares.map((row) => row[bin]));
    const yaxis = { title: { text: "value" }, automargin: false, showgrid: false, range: [-0.5, z.length - 0.5], ...valueTicks(card.shown.edges) };
    const layout = layoutOf(colours, { hovermode: "closest", margin: { ...MARGIN }, xaxis: { title: { text: "step" }, automargin: false }, yaxis });
    return card.react([{ ...HEAT, x: card.shown.x, z, zmin: 0, zmax: 1, colorscale: scaleOf(densityScale(colours)) }], layout);
  },

  // Distributions as ridges, the earliest behind: each rises from a line of its own, in even steps of time.
  drawRidges(card, counts, colours) {
    const n = Math.min(RIDGES, counts.length);
    const chosen = Array.from({ length: n }, (_, i) => (n === 1 ? 0 : Math.round((i * (counts.length - 1)) / (n - 1))));
    const tones = DENSITY[colours.dark ? "dark" : "light"].slice(1, 5);
    const data = chosen.map((at, i) => {
      const row = counts[at];
      const most = Math.max(1, ...row);
      const base = n - 1 - i;
      const x = [0, ...row.map((_, bin) => bin), row.length - 1];
      const y = [base, ...row.map((count) => base + (2.6 * count) / most), base];
      const fillcolor = tones[Math.floor((i / n) * tones.length)];
      return { type: "scatter", mode: "lines", x, y, fill: "toself", fillcolor, line: { color: colours.back, width: 1 }, hoverinfo: "skip" };
    });
    const labelled = [...new Set([0, 0.33, 0.67, 1].map((share) => Math.round(share * (n - 1))))];
    const tickvals = labelled.map((i) => n - 1 - i);
    const ticktext = labelled.map((i) => card.shown.x[chosen[i]].toLocaleString("en"));
    const yaxis = { title: { text: "step" }, range: [-0.4, n + 2], tickvals, ticktext, automargin: false, fixedrange: true };
    const xaxis = { title: { text: "value" }, range: [-0.5, counts[0].length - 0.5], automargin: false, fixedrange: true, ...valueTicks(card.shown.edges) };
    return card.react(data, layoutOf(colours, { hovermode: false, margin: { ...MARGIN }, xaxis, yaxis }));
  },

  listenValues() {
    const { plot } = this.cards.values;
    plot.on("plotly_unhover", () => this.tip.hide());
    plot.on("plotly_hover", ({ points, event }) => {
      const { x, y, z } = points[0];
      const { edges } = this.cards.values.shown;
      const share = `${Math.round(100 * z * z)} % of the fullest bin`;
      this.tip.show(event, [`values ${compact(edges[y])} to ${compact(edges[y + 1])}`, `step ${x.toLocaleString("en")}`, share]);
    });
  },
});

// Layers' levels (roots of shares of 255) as one row of shares: of each layer, then their mean.
function sharesOf(layers) {
  const out = new Float64Array(layers[0].length);
  for (const bytes of layers) {
    let total = 0;
    for (const level of bytes) total += level * level;
    if (total) bytes.forEach((level, i) => (out[i] += (level * level) / total));
  }
  return out;
}

// Counts as roots of their shares of the fullest: the root lifts the tails.
function rootsOf(counts) {
  const most = Math.max(...counts) || 1;
  return counts.map((count) => Math.sqrt(count / most));
}
