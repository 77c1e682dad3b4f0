// The Inspector's line charts: each method of View named after a card draws it from the store; those of the other run dashed.

const MARGIN = { l: 52, r: 12, t: 8, b: 34 };

// Plots of lines share their margins, so that steps stand under steps.
function lineLayout(colours, { yaxis, ...rest }) {
  const axis = { nticks: 6, automargin: false, ...yaxis };
  const xaxis = { title: { text: "step" }, automargin: false };
  return layoutOf(colours, { hovermode: "x unified", uirevision: "kept", margin: { ...MARGIN }, ...rest, xaxis, yaxis: axis });
}

const lineOf = (held, name, colour, own = {}) => ({ type: "scatter", mode: "lines", x: held.x, y: held.y, name: plain(name), line: { color: colour, width: 1.75 }, ...own });

// A range that shows what training does: that of the loss, and of held-out values within three times of it. What lies outside is
// drawn as a triangle at the edge, its value on hover.
function lossRange(loss, held) {
  const known = loss.filter((v) => v !== null);
  if (!known.length) return null;
  const sorted = [...known].sort((a, b) => a - b);
  const many = sorted.length > 200;
  let low = sorted[many ? Math.floor(0.002 * sorted.length) : 0];
  let high = sorted[many ? Math.ceil(0.998 * sorted.length) - 1 : sorted.length - 1];
  const reach = high + 2 * Math.max(high - low, 0.05 * Math.abs(high));
  for (const v of held) {
    if (v === null || v > reach) continue;
    low = Math.min(low, v);
    high = Math.max(high, v);
  }
  const room = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
}

Object.assign(View.prototype, {
  async loss(colours) {
    const { store } = this;
    const card = this.cards.loss;
    const { ink } = colours;
    const loss = store.lines.get("loss");
    if (!loss?.x.length) return card.wait();
    const data = [];
    const entries = [];
    const right = [];
    const inLoss = [];
    const all = [];
    const draw = (from, other) => {
      const dash = other ? "dash" : "solid";
      const suffix = other ? " (other)" : "";
      const own = from.lines.get("loss");
      if (!own?.x.length) return;
      const enough = own.y.length > 20;
      const weight = 1 - 1 / Math.min(8, Math.max(2, own.y.length / 40)); // an average over a fortieth of the run hardly lags
      const line = { x: own.x, y: enough ? smoothed(own.y, weight) : own.y };
      if (enough && !other) data.push(lineOf(own, "loss", faded(ink[0], 0.28), { line: { color: faded(ink[0], 0.28), width: 1 }, hoverinfo: "skip" }));
      data.push(lineOf(line, `loss${suffix}`, ink[0], { line: { color: ink[0], width: other ? 1.5 : 2, dash } }));
      all.push(...own.y);
      const broken = (v) => (v === null ? "not finite" : compact(v));
      entries.push({ colour: ink[0], label: `loss${suffix}`, dash: other, line: own.y.at(-1) === null ? own : line, text: (v) => (v === null && own.y.at(-1) !== null ? "–" : broken(v)) });
      if (own.y.at(-1) === null) entries.at(-1).text = () => (this.scrubber.step === null ? "not finite" : broken(valueAt(own, this.scrubber.step)));
      (from.facts.get("metrics") ?? []).forEach((metric, i) => {
        const held = from.lines.get(`metric:${metric}`);
        if (!held?.x.length) return;
        const isLoss = metric.includes("loss");
        (isLoss ? inLoss : right).push(...held.y);
        const colour = ink[(i + 1) % ink.length];
        const label = ["loss", "val_loss"].includes(metric) ? "held-out loss" : metric;
        const mode = held.x.length > 60 ? "lines" : "lines+markers";
        data.push(lineOf(held, label + suffix, colour, { mode, yaxis: isLoss ? "y" : "y2", line: { color: colour, width: 1.5, dash }, marker: { color: colour, size: 5 } }));
        if (!other) entries.push({ colour, label, line: held, text: compact });
      });
    };
    draw(store, false);
    if (store.beside) draw(store.beside, true);
    card.legend(entries);
    const positive = [...all, ...inLoss].filter((v) => v > 0);
    const log = this.logLoss && positive.length > 0;
    const range = lossRange(all, inLoss);
    const yaxis = log ? logTicks(Math.min(...positive), Math.max(...positive)) : { range };
    const layout = lineLayout(colours, { yaxis, margin: { ...MARGIN, r: right.length ? 40 : MARGIN.r } });
    if (right.length) {
      layout.yaxis2 = { ...layout.yaxis, type: "linear", tickvals: undefined, ticktext: undefined, overlaying: "y", side: "right", showgrid: false, tickmode: "auto", nticks: 6 };
      layout.yaxis2.range = rangeOfShares(right);
    }
    if (!log && range) data.push(...data.flatMap((trace) => this.beyond(trace, range[1])));
    return card.react(data, layout);
  },

  // What of a trace lies above the range: triangles at its edge.
  beyond(trace, top) {
    if (trace.yaxis === "y2" || trace.hoverinfo === "skip") return [];
    const at = trace.x.filter((_, i) => trace.y[i] > top);
    if (!at.length || at.length > 40) return [];
    const text = trace.y.filter((v) => v > top).map((v) => `${trace.name} ${compact(v)}, above this scale`);
    const marker = { symbol: "triangle-up", size: 8, color: trace.marker?.color ?? trace.line.color };
    return [{ type: "scatter", mode: "markers", x: at, y: at.map(() => top), text, hoverinfo: "text", marker, cliponaxis: false }];
  },

  async throughput(colours) {
    const card = this.cards.throughput;
    const { ink } = colours;
    const rate = this.store.lines.get("rate");
    if (!rate?.x.length) return card.wait();
    const data = [];
    const entries = [];
    const draw = (held, other) => {
      if (!held?.x.length) return;
      const enough = held.y.length > 20;
      const line = enough ? { x: held.x, y: smoothed(held.y, 0.8) } : held;
      if (enough && !other) data.push(lineOf(held, "", faded(ink[0], 0.25), { line: { color: faded(ink[0], 0.25), width: 1 }, hoverinfo: "skip" }));
      const fill = other ? {} : { fill: "tozeroy", fillcolor: faded(ink[0], 0.07) };
      data.push(lineOf(line, other ? "samples/s (other)" : "samples/s", ink[0], { line: { color: ink[0], width: 1.75, dash: other ? "dash" : "solid" }, ...fill }));
      entries.push({ colour: ink[0], label: other ? "other" : "samples/s", dash: other, line, text: compact });
    };
    draw(rate, false);
    draw(this.store.beside?.lines.get("rate"), true);
    card.legend(entries);
    const { overhead } = this.store.facts.get("sampling") ?? {};
    this.rateText.hidden = overhead === undefined;
    this.rateText.textContent = overhead === undefined ? "" : `Readings take ${(100 * overhead).toFixed(overhead < 0.1 ? 1 : 0)} % of the time.`;
    const known = data.flatMap(({ y }) => y.filter((v) => v !== null));
    return card.react(data, lineLayout(colours, { yaxis: { range: [0, 1.1 * Math.max(...known)], nticks: 5 } }));
  },

  async communication(colours) {
    const { store } = this;
    const card = this.cards.communication;
    const { ranks = [], exposed = null, link = "", hosts = 1, network = null, bandwidth = null } = store.facts.get("times") ?? {};
    if (ranks.length < 2) return;
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
      if (entries.length < 9) entries.push({ colour, label, dash, line: { x: held.x, y }, text: (v) => `${compact(v)} ms` });
    };
    const { ink } = colours;
    shown.forEach((rank, i) => draw(of(rank, "busy"), shown.length > 1 ? `rank ${rank}` : "own work", ink[i % ink.length]));
    if (shown.length === 1) draw(of(shown[0], "waited"), "waiting for samples", ink[1]);
    draw(of(shown[0], "step"), "with waits for other ranks", colours.soft, true);
    card.legend(entries);
    const rate = bandwidth ? `, ${compact(bandwidth / 1e9)} GB/s in an all-reduce` : "";
    const wires = hosts > 1 && network ? `; network ${compact(network)} Gb/s between ${hosts} hosts` : "";
    const share = exposed === null ? "" : `Exposed communication: ${(100 * exposed).toFixed(exposed < 0.1 ? 1 : 0)} % of a step. `;
    this.timesText.hidden = false;
    this.timesText.textContent = `${share}Ranks are linked by ${link}${rate}${wires}.`;
    const yaxis = { rangemode: "tozero", title: { text: "ms" }, nticks: 5 };
    return card.react(data, lineLayout(colours, { yaxis }));
  },
});
