// The memory card: what holds a rank's memory over time and by layer, several ranks side by side, and memory snapshots.

const MEMORY_ROWS = ["parameters", "optimizer", "buffers", "average", "exchange", "teacher", "data", "accumulated", "activations", "rest", "gradients", "other"];
const MEMORY_MOMENTS = { forward: { accumulated: "gradients", activations: "activations", rest: "other" }, backward: { gradients: "gradients", other: "other" } };
const MEMORY_COLOURS = { parameters: "#4b7fe0", optimizer: "#8a66cc", buffers: "#5aa7c7", average: "#b08a5a", exchange: "#c76aa5", teacher: "#7d6a58", data: "#7fa83c", gradients: "#d98a1f", activations: "#2a9d82", other: "#8d959e" };
const MEMORY_WORDS = { optimizer: "optimizer state", average: "average of weights", exchange: "exchange of gradients", data: "samples" };
const LAYER_HOLDERS = ["parameters", "gradients", "optimizer", "activations"];
const memoryWord = (holder) => MEMORY_WORDS[holder] ?? holder;

function sizeText(n) {
  const [size, name] = [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]].find(([least]) => n >= least) ?? [1, "B"];
  return `${(n / size).toLocaleString("en", { maximumSignificantDigits: 3 })} ${name}`;
}

// Elements of the card that live as long as the view.
class MemoryParts {
  constructor(view) {
    this.view = view;
    this.layered = false;
    const card = view.cards.memory;
    const pick = (text, layered) => h("button", { type: "button", class: "wi-tab", onclick: () => this.show(layered) }, text);
    this.tabs = h("div", { class: "wi-tabs", role: "group", "aria-label": "Memory over time or by layer" }, pick("over time", false), pick("by layer", true));
    this.ranks = h("div", { class: "wi-memory-ranks" });
    card.aside.append(this.ranks, this.tabs);
    this.legend = h("div", { class: "wi-memory-legend" });
    this.snapshots = h("div", { class: "wi-memory-snapshots" });
    card.foot.prepend(this.legend);
    card.foot.append(this.snapshots);
    this.frame = h("section", { class: "wi-snapshot", "aria-label": "Memory snapshot", hidden: true });
    view.grid.append(this.frame);
  }

  show(layered) {
    this.layered = layered;
    this.view.painter.touch("memory");
  }

  drawTabs(possible) {
    this.tabs.hidden = !possible;
    [...this.tabs.children].forEach((tab, i) => tab.setAttribute("aria-pressed", String(Boolean(i) === this.layered)));
  }

  drawSnapshots() {
    const told = this.view.model.offline ? null : this.view.store.facts.get("memory:snapshots"); // a file has no kernel to ask
    const { names = [], can = false, words = "" } = told ?? {};
    const key = JSON.stringify([names, can, words]);
    if (this.drawn === key) return;
    this.drawn = key;
    const ask = () => this.view.ask("snapshot", null);
    const button = can ? h("button", { type: "button", class: "link small", title: "Record every allocation of the next two steps", onclick: ask }, "Snapshot") : null;
    const open = (name) => this.view.ask("open_snapshot", { name, theme: theme(this.view.el).dark ? "dark" : "light" });
    const list = names.length ? h("select", { "aria-label": "Memory snapshot to open", class: "wi-pick", onchange: ({ target }) => target.value && open(target.value) }, h("option", { value: "" }, "open a snapshot"), ...names.map((name) => h("option", { value: name }, name.replace("step-", "step ").replace("-rank-", ", rank ")))) : null;
    this.snapshots.replaceChildren(...[button, list, words ? h("span", { class: "quiet", role: "status" }, words) : null].filter(Boolean));
  }

  drawFrame() {
    const open = this.view.store.facts.get("memory:snapshot") ?? null;
    this.frame.hidden = !open;
    if (this.opened === open?.key) return;
    this.opened = open?.key;
    if (!open) return this.frame.replaceChildren();
    const close = h("button", { class: "quiet", type: "button", "aria-label": "Close the snapshot", onclick: () => this.view.ask("open_snapshot", null) }, "Close");
    // Scripts of its own and nothing else: no access to the notebook, no requests.
    const frame = h("iframe", { sandbox: "allow-scripts", title: `Memory snapshot ${open.name}`, srcdoc: open.html });
    this.frame.replaceChildren(h("header", {}, h("h3", {}, "Memory snapshot"), close), frame);
    this.frame.scrollIntoView({ block: "nearest" });
  }
}

Object.assign(View.prototype, {
  async memory(colours) {
    const { store } = this;
    const card = this.cards.memory;
    const parts = (this.memoryParts ??= new MemoryParts(this));
    const { ranks = [], total = 0 } = store.facts.get("memory") ?? {};
    const chosen = store.facts.get("choice")?.rank ?? null;
    const shown = chosen === null ? ranks : ranks.filter((rank) => rank === chosen);
    parts.drawSnapshots();
    parts.drawFrame();
    const of = (rank, field) => store.lines.get(`memory:${rank}:${field}`);
    if (!shown.some((rank) => of(rank, "allocated")?.x.length)) return card.wait();
    const holding = shown.length === 1 ? store.facts.get("memory:holding") : null;
    parts.drawTabs(Boolean(holding?.layers.length));
    const most = (field) => Math.max(0, ...shown.flatMap((rank) => of(rank, field)?.y ?? []));
    const layered = parts.layered && Boolean(holding?.layers.length);
    this.memoryWords({ holding, layered, total, peak: most("peak"), several: shown.length > 1, latest: lastOf(of(shown[0], "allocated")) });
    if (layered) return this.memoryLayers(holding.layers);
    return this.memoryTimeline(colours, { shown, of, holding, total, largest: Math.max(most("peak"), most("reserved")) });
  },

  memoryWords({ holding, layered, total, peak, several, latest }) {
    const process = this.store.facts.get("header")?.facts.startsWith("cpu");
    const words = [];
    if (layered) words.push("Activations as the forward pass left them in the first readings.");
    else if (holding?.process) words.push(`The process takes ${sizeText(latest)}, Python and its libraries included; shown is what is the run's.`);
    else if (holding) words.push(holding.moment === "forward" ? "Stacked: the end of the forward pass, the fuller moment of a step; allocated: after the backward pass." : "Stacked: after the backward pass, the fuller moment of a step.");
    if (holding?.fragmentation) words.push(`${(100 * holding.fragmentation).toFixed(1)}\u00a0% of what is reserved is free in pieces.`);
    if (several) words.push("Choose a rank to see what holds its memory.");
    if (total) words.push(`${sizeText(total)} in all on ${process ? "this machine" : "each device"}; peak ${((100 * peak) / total).toFixed(0)}\u00a0%.`);
    this.memoryTotal.hidden = !words.length;
    this.memoryTotal.textContent = words.join(" ");
  },

  memoryLayers(layers) {
    const card = this.cards.memory;
    const sum = (held) => held.reduce((a, b) => a + Math.max(0, b ?? 0), 0);
    const single = ({ layer }) => !layer.endsWith(" other layers");
    const most = Math.max(...layers.filter(single).map(({ held }) => sum(held)), 1);
    const rows = layers.map((row) => {
      const { layer, held } = row;
      const bars = !single(row) ? [] : held.map((n, i) => {
        const bar = h("i", { title: `${memoryWord(LAYER_HOLDERS[i])} ${sizeText(Math.max(0, n ?? 0))}` });
        bar.style.cssText = `width: ${(100 * Math.max(0, n ?? 0)) / most}%; background: ${MEMORY_COLOURS[LAYER_HOLDERS[i]]}`;
        return bar;
      });
      return h("li", {}, h("span", { title: layer }, h("bdi", {}, layer)), h("div", {}, ...bars), h("b", {}, sizeText(sum(held))));
    });
    if (card.drawn) globalThis.Plotly.purge(card.plot);
    card.drawn = false;
    card.plot.replaceChildren(h("ol", { class: "wi-layers" }, ...rows));
    this.memoryLegend(LAYER_HOLDERS.filter((_, i) => layers.some(({ held }) => held[i])).map((holder, i) => ({ colour: MEMORY_COLOURS[holder], label: memoryWord(holder), value: "", box: true })));
    this.memoryParts.ranks.replaceChildren();
  },

  memoryLegend(entries) {
    const list = legendOf(entries);
    [...list.children].forEach((item, i) => entries[i].box && item.firstChild.classList.add("box"));
    this.memoryParts.legend.replaceChildren(list);
  },

  async memoryTimeline(colours, { shown, of, holding, total, largest }) {
    const { store } = this;
    const card = this.cards.memory;
    const grid = holding ? store.grids.get("memory:parts") : null;
    const data = [];
    const entries = [];
    let top = 0;
    if (grid?.x.length) {
      const stack = [...MEMORY_ROWS.slice(0, 7).map((row) => [row, row]), ...Object.entries(MEMORY_MOMENTS[holding.moment])];
      const known = stack.filter(([, holder]) => !(holding.process && holder === "other")).map(([row, holder]) => [holder, grid.columns.map((column) => Math.max(0, column[MEMORY_ROWS.indexOf(row)] || 0))]);
      top = Math.max(...grid.x.map((_, i) => known.reduce((sum, [, y]) => sum + y[i], 0)));
      data.push(...known.filter(([, y]) => Math.max(...y) > 0.002 * top).map(([holder, y]) => ({ type: "scatter", mode: "lines", stackgroup: "holders", x: grid.x, y, name: memoryWord(holder), line: { width: 0, color: MEMORY_COLOURS[holder] }, fillcolor: faded(MEMORY_COLOURS[holder], 0.85), holder })));
    }
    const limit = holding?.process ? top : largest;
    const unit = bytesUnit(limit);
    const scaled = (y) => y.map((v) => (v === null ? null : v / unit.size));
    for (const trace of data) {
      entries.push({ colour: MEMORY_COLOURS[trace.holder], label: trace.name, value: sizeText(trace.y.at(-1)), box: true });
      trace.y = scaled(trace.y);
      delete trace.holder;
    }
    const draw = (rank, field, colour, dash, label) => {
      const held = of(rank, field);
      if (!held) return;
      data.push({ type: "scatter", mode: "lines", x: held.x, y: scaled(held.y), name: label, line: { color: colour, width: 1.5, dash } });
      entries.push({ colour, label, value: sizeText(lastOf(held) ?? 0), dash: dash !== "solid" });
    };
    const { ink } = colours;
    if (shown.length > 1) shown.forEach((rank, i) => draw(rank, "allocated", ink[i % ink.length], "solid", `rank ${rank}`));
    else if (!holding?.process) {
      const plainly = !grid?.x.length;
      const same = of(shown[0], "reserved")?.y.every((v, k) => v === of(shown[0], "allocated").y[k]);
      draw(shown[0], "allocated", plainly ? ink[0] : colours.text, "solid", "allocated");
      if (!same) draw(shown[0], "reserved", plainly ? ink[1] : colours.soft, plainly ? "solid" : "dash", "reserved");
      draw(shown[0], "peak", plainly ? ink[2] : colours.text, "dot", "peak");
    }
    this.memoryLegend(entries);
    const layout = layoutOf(colours, { hovermode: "x unified", uirevision: "kept", xaxis: { title: { text: "step" } }, yaxis: { rangemode: "tozero", title: { text: unit.name }, nticks: 6 } });
    if (total > 0 && limit > 0.4 * total) {
      const line = { color: colours.soft, width: 1, dash: "dash" };
      layout.shapes = [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: total / unit.size, y1: total / unit.size, line }];
      layout.yaxis.range = [0, (1.05 * total) / unit.size];
    }
    return card.react(data, layout);
  },
});
