// The Inspector's page: header, time, findings, a card a kind of reading, and the history of a chosen layer.

const HEIGHT = 232;
const WAITING = {
  loss: "waiting for the first steps…",
  gradients: "waiting for the first reading of the gradients…",
  activations: "waiting for the first reading of the activations…",
  memory: "waiting for the first reading of the memory…",
  throughput: "waiting for the first steps…",
  communication: "waiting for the first steps…",
};
const MARKS = { error: "✕", warning: "▲", info: "i" };
const FINISHED = ["finished", "stopped", "failed", "lost"];

class View {
  constructor({ model, el, signal, store }) {
    Object.assign(this, { model, el, store, signal });
    el.classList.add("wb-inspector-host");
    // JupyterLab's own shortcuts must not fire on keys that move through time.
    this.root = h("div", { class: "wb wb-inspector", role: "region", "aria-label": "Inspector", "data-lm-suppress-shortcuts": "true" });
    this.findings = h("section", { class: "wi-findings", "aria-label": "Findings", "aria-live": "polite" });
    this.cards = {
      loss: new Card("loss", "Loss", WAITING.loss, HEIGHT),
      gradients: new Card("gradients", "Gradients", WAITING.gradients, HEIGHT),
      activations: new Card("activations", "Activations", WAITING.activations, HEIGHT, { timed: false }),
      memory: new Card("memory", "Memory", WAITING.memory, HEIGHT),
      throughput: new Card("throughput", "Throughput", WAITING.throughput, 168),
      communication: new Card("communication", "Time of a step", WAITING.communication, 168),
      norm: new Card("norm", "Gradient norm", "no gradient readings for this layer", 184),
      values: new Card("values", "Distribution of outputs", "no activation readings for this layer", 184),
    };
    const { norm, values, ...main } = this.cards;
    this.detailTitle = h("h3", {});
    const close = h("button", { class: "quiet", type: "button", "aria-label": "Close the layer's history", onclick: () => this.choose(null) }, "Close");
    const detailHead = h("header", {}, this.detailTitle, close);
    this.detail = h("section", { class: "wi-detail", hidden: true, "aria-label": "History of a layer" }, detailHead, norm.element, values.element);
    this.grid = h("div", { class: "wi-grid" }, ...Object.values(main).map((card) => card.element), this.detail);
    this.scrubber = new Scrubber({ steps: () => this.steps(), choose: (step) => this.travel(step) });
    this.comparison = new Comparison({ ask: (kind, value) => this.ask(kind, value) });
    this.buildHeader();
    this.root.append(this.header, this.scrubber.element, this.comparison.strip, this.findings, this.grid);
    el.append(this.root);
    this.tip = new Tooltip(this.root);
    this.buildControls();
    this.root.addEventListener("keydown", (event) => event.target.matches("input, select, textarea") || this.scrubber.key(event));
    const painter = { signal, report: (times) => tell(model, { kind: "drawn", times }), inSight: (name) => !this.outOfSight.has(name) };
    this.painter = new Painter(this.root, (name) => this[name](theme(el)), painter);
    this.watchSight();
    const changed = (names, whole) => this.changed(names, whole);
    store.listeners.add(changed);
    const told = (content, buffers) => this.told(content, buffers);
    model.on("msg:custom", told);
    signal.addEventListener("abort", () => {
      store.listeners.delete(changed);
      model.off("msg:custom", told);
      this.sight.disconnect();
      for (const card of Object.values(this.cards)) card.purge();
    });
    this.changed(new Set(), true);
    if (!model.offline) this.ask("runs");
  }

  changed(names, whole) {
    const { store, painter } = this;
    const { facts } = store;
    if (whole || names.has("header")) this.drawHeader(facts.get("header"));
    if (whole || names.has("findings") || names.has("header")) this.drawFindings(facts.get("findings") ?? []);
    if (whole || names.has("choice") || names.has("layers") || names.has("quantities")) this.drawChoice();
    if (facts.get("header")) this.comparison.show(facts.get("header"), facts.get("beside"), facts.get("differences") ?? []);
    this.arrange();
    const all = [...names];
    if (whole || all.some((n) => n === "loss" || n.startsWith("metric"))) painter.touch("loss");
    if (whole || all.some((n) => n.startsWith("memory"))) painter.touch("memory");
    if (names.has("memory:snapshot")) this.memoryParts?.drawFrame(); // below the card, which then is out of sight and not drawn
    if (whole || names.has("rate") || names.has("sampling")) painter.touch("throughput");
    if (whole || names.has("choice") || all.some((n) => n.startsWith("time"))) painter.touch("communication");
    if (whole || all.some((n) => n.startsWith("gradients"))) painter.touch("gradients", "norm");
    if (whole || names.has("activations")) painter.touch("activations");
    if (whole || names.has("layer")) painter.touch("values");
    if (names.has("choice")) painter.touch("gradients", "activations", "norm", "values");
    if (whole || all.some((n) => n.startsWith("gradients") || n === "loss" || n === "header")) this.scrubber.show(facts.get("header"));
  }

  // Two cards a row; the throughput fills the row that would have one.
  arrange() {
    const { communication, throughput, gradients, activations } = this.cards;
    communication.element.hidden = (this.store.facts.get("times")?.ranks ?? []).length < 2; // one rank waits for no other
    const narrow = 6 - [communication.element.hidden, gradients.wide, activations.wide].filter(Boolean).length;
    throughput.element.classList.toggle("wide", narrow % 2 === 1);
  }

  // Answers of the kernel that are not numbers to keep.
  told(content, buffers) {
    if (content.kind === "runs") this.comparison.offer(content.runs);
    if (content.kind === "file") {
      const address = URL.createObjectURL(new Blob([buffers[0]], { type: "text/html" }));
      h("a", { href: address, download: content.name }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60_000);
      Object.assign(this.exporter, { disabled: false, textContent: "Export" });
    }
  }

  // Cards out of sight are drawn when they come into it.
  watchSight() {
    this.outOfSight = new Set();
    this.sight = new IntersectionObserver((entries) => {
      for (const { target, isIntersecting } of entries) this.outOfSight[isIntersecting ? "delete" : "add"](target.dataset.card);
      this.painter.schedule();
    });
    for (const card of Object.values(this.cards)) this.sight.observe(card.element);
  }

  // -- time ----------------------------------------------------------------------------------------------------------

  // Steps that can be shown: those of the readings, or where there are none those of the loss.
  steps() {
    return this.store.grids.get("gradients")?.x ?? this.store.lines.get("loss")?.x ?? [];
  }

  // The page at a step; null follows the latest.
  travel(step) {
    for (const card of Object.values(this.cards)) card.mark("cursor", step);
    this.ask("time", step, 60);
  }

  // The steps that all cards show: what was zoomed into, or all.
  range() {
    if (this.zoom) return this.zoom;
    const ends = [this.store, this.store.beside].flatMap((store) => {
      const known = store ? [store.lines.get("loss")?.x, store.grids.get("gradients")?.x].filter((x) => x?.length) : [];
      return known.flatMap((x) => [x[0], x.at(-1)]);
    });
    if (!ends.length) return undefined;
    const [first, last] = [Math.min(...ends), Math.max(...ends)];
    return first === last ? [0, 1.05 * last || 1] : [first, last + 0.005 * (last - first)];
  }

  listenTime(card) {
    const { plot } = card;
    const everywhere = (step) => Object.values(this.cards).forEach((other) => other.mark("pointer", other === card ? null : step));
    plot.on("plotly_hover", ({ points }) => card.timed && everywhere(points[0].x));
    plot.on("plotly_unhover", () => everywhere(null));
    plot.on("plotly_relayout", (change) => {
      if (!card.timed || change["xaxis.range[0]"] === undefined) return;
      this.zoom = [change["xaxis.range[0]"], change["xaxis.range[1]"]];
      this.painter.touch(...Object.keys(this.cards));
    });
    plot.on("plotly_doubleclick", () => {
      this.zoom = null;
      this.painter.touch(...Object.keys(this.cards));
    });
  }

  // `pause`: milliseconds within which only the last question of its kind is sent.
  ask(kind, value, pause = 0) {
    this.asking ??= {};
    clearTimeout(this.asking[kind]);
    if (!pause) return tell(this.model, { kind, value });
    this.asking[kind] = setTimeout(() => tell(this.model, { kind, value }), pause);
  }

  choose(layer) {
    this.ask("layer", layer);
  }

  // -- words ---------------------------------------------------------------------------------------------------------

  buildHeader() {
    const part = (name) => h("div", { class: name });
    this.words = { title: part("wi-title"), stats: part("wi-stats"), rank: part("wi-rank"), problem: part("wi-problem") };
    const onclick = () => {
      Object.assign(this.exporter, { disabled: true, textContent: "Exporting…" });
      this.ask("export");
    };
    this.exporter = h("button", { type: "button", class: "small", title: "Save this page as one file that works offline", onclick }, "Export");
    this.actions = h("div", { class: "wi-actions", hidden: Boolean(this.model.offline) }, this.words.rank, this.comparison.chooser, this.exporter);
    this.header = h("header", { class: "wi-head" }, this.words.title, this.words.stats, this.actions, this.words.problem);
  }

  drawHeader(header) {
    const { title, stats, problem } = this.words;
    this.root.classList.toggle("empty", !header);
    this.actions.hidden = !header || Boolean(this.model.offline);
    if (!header) {
      const known = this.store.sequence !== null;
      title.replaceChildren(h("p", { class: "quiet" }, known ? "No run is open. inspector.open(run) shows one." : "connecting to the kernel…"));
      stats.replaceChildren();
      return;
    }
    const stat = (label, value, of) => h("p", {}, h("span", {}, label), h("b", {}, value, of ? h("small", {}, of) : null));
    const number = (n) => n.toLocaleString("en");
    const told = [stat("Step", number(header.step), header.total ? ` / ${number(header.total)}` : ""), stat("Epoch", number(header.epoch))];
    if (header.rate !== null) told.push(stat("Samples/s", number(header.rate)));
    if (header.left) told.push(stat("Time left", header.left));
    const name = h("div", { class: "wi-name" }, h("h2", { title: header.name }, header.name), h("span", { class: `chip ${header.status}` }, header.status));
    title.replaceChildren(name, h("p", { class: "quiet small" }, header.facts || "not started yet"));
    stats.replaceChildren(...told);
    this.drawRanks(header.ranks);
    problem.replaceChildren(...(header.problem ? [h("p", { class: "notice error", role: "alert" }, header.problem)] : []));
    for (const [key, text] of Object.entries(WAITING)) {
      const empty = FINISHED.includes(header.status) ? "this run recorded none" : text;
      if (this.cards[key].empty === empty) continue;
      this.cards[key].empty = empty;
      this.painter?.touch(key);
    }
  }

  drawRanks(ranks) {
    const rank = String(this.store.facts.get("choice")?.rank ?? "all");
    const key = `${ranks}:${rank}`;
    if (this.rankKey === key) return;
    this.rankKey = key;
    if (ranks < 2) return this.words.rank.replaceChildren();
    const option = (value, text) => h("option", { value, selected: rank === value }, text);
    const options = [option("all", "all ranks"), ...Array.from({ length: ranks }, (_, i) => option(String(i), `rank ${i}`))];
    const onchange = ({ target }) => {
      target.blur();
      this.ask("rank", target.value === "all" ? null : Number(target.value));
    };
    this.words.rank.replaceChildren(h("select", { class: "wi-pick", onchange, "aria-label": "Rank" }, ...options));
  }

  drawFindings(findings) {
    const header = this.store.facts.get("header");
    if (!findings.length) {
      const quiet = header && header.step > 0 ? "No findings: gradients, activations and loss look healthy." : "";
      this.findings.replaceChildren(...(quiet ? [h("p", { class: "quiet small" }, h("i", { class: "ok", "aria-hidden": "true" }, "✓"), quiet)] : []));
      return;
    }
    const shown = this.allFindings ? findings : findings.slice(0, 3);
    const items = shown.map((finding) => {
      const words = h("p", {}, finding.message);
      if (finding.layer) {
        const onclick = () => this.choose(finding.layer);
        words.append(" ", h("button", { type: "button", class: "link", onclick }, "show the layer"));
      }
      const mark = h("i", { class: finding.severity, role: "img", "aria-label": finding.severity }, MARKS[finding.severity] ?? "i");
      return h("li", {}, mark, h("div", {}, words, ...this.drawRemedies(finding, () => this.drawFindings(findings))));
    });
    const parts = [h("ul", {}, ...items)];
    if (findings.length > 3) {
      const onclick = () => {
        this.allFindings = !this.allFindings;
        this.drawFindings(findings);
      };
      const text = this.allFindings ? "show fewer" : `show all ${findings.length}`;
      parts.push(h("button", { type: "button", class: "link small", "aria-expanded": String(Boolean(this.allFindings)), onclick }, text));
    }
    this.findings.replaceChildren(...parts);
  }

  // A line for the first remedy, and for each further one once they are asked for.
  drawRemedies({ name, remedies }, redraw) {
    const all = this.allRemedies?.has(name);
    const lines = remedies.slice(0, all ? undefined : 1).flatMap((remedy, number) => {
      const line = h("p", { class: "quiet small" }, number ? "Or " : "Try ", h("code", {}, remedy.text));
      return [line, this.applicable(remedy, line, redraw)];
    });
    if (remedies.length > 1) {
      const onclick = () => {
        this.allRemedies ??= new Set();
        this.allRemedies[all ? "delete" : "add"](name);
        redraw();
      };
      const words = all ? "fewer" : `${remedies.length - 1} more`;
      lines[0].append(" ", h("button", { type: "button", class: "link", "aria-expanded": String(Boolean(all)), onclick }, words));
    }
    return lines;
  }

  // The button that applies a remedy, or what became of it, added to its line; the code that the button runs, where it is open.
  applicable({ key, code, applied }, line, redraw) {
    if (this.model.offline) return null;
    const open = this.codeOf === key;
    const onclick = () => {
      this.codeOf = open ? null : key;
      redraw();
    };
    const act = applied
      ? h("span", { role: "status" }, applied)
      : h("button", { type: "button", class: "link", title: code, onclick: () => this.ask("apply", key) }, "Apply");
    line.append(" ", act, " ", h("button", { type: "button", class: "link", "aria-expanded": String(open), onclick }, open ? "hide code" : "code"));
    return open ? h("pre", {}, code) : null;
  }

  buildControls() {
    const pick = (kind) => {
      const onchange = (event) => this.choose(event.target.value || null);
      return h("select", { "aria-label": `Layer whose ${kind} to show over time`, onchange, class: "wi-pick", hidden: true });
    };
    this.pickers = { gradients: pick("gradients"), activations: pick("activations") };
    this.opened = { gradients: new Set(), activations: new Set() };
    this.byLayer = { gradients: false, activations: false };
    this.shownRun = { gradients: "this", activations: "this" };
    this.labels = {};
    for (const kind of ["gradients", "activations"]) {
      const card = this.cards[kind];
      this.labels[kind] = new RowLabels(card, (row) => this.press(kind, row));
      card.switches = h("div", { class: "wi-switches" });
      card.note = h("div", { class: "wi-note" });
      card.aside.append(card.switches, this.expander(card));
      card.rowSwitch = h("div", { class: "wi-rowswitch" });
      card.foot.append(card.note, card.rowSwitch, this.pickers[kind]);
      card.listen = () => this.listenHeat(kind);
    }
    const onchange = (event) => this.ask("quantity", event.target.value);
    this.quantities = h("select", { class: "wi-pick strong", "aria-label": "Quantity of the gradients", onchange });
    this.cards.gradients.title.after(this.quantities);
    this.atStep = h("span", { class: "quiet small" });
    this.cards.activations.title.after(this.atStep);
    const onscale = (value) => {
      this.logLoss = value === "log";
      this.painter.touch("loss");
    };
    const scale = segmented("Scale of the loss", [["linear", "linear"], ["log", "log"]], "linear", onscale);
    this.cards.loss.foot.append(h("div", { class: "wi-switches" }, scale));
    const onridges = (value) => {
      this.ridges = value === "ridges";
      this.painter.touch("values");
    };
    this.cards.values.aside.append(segmented("Drawn as", [["map", "map"], ["ridges", "ridges"]], "map", onridges));
    this.memoryTotal = h("p", { hidden: true });
    this.cards.memory.foot.append(this.memoryTotal);
    this.rateText = h("p", { hidden: true });
    this.cards.throughput.foot.append(this.rateText);
    this.timesText = h("p", { hidden: true });
    this.cards.communication.foot.append(this.timesText);
    this.cards.communication.element.hidden = true;
    this.cards.values.listen = () => this.listenValues();
    for (const card of Object.values(this.cards)) {
      const own = card.listen;
      card.range = () => this.range();
      card.listen = () => {
        own?.();
        if (card !== this.cards.activations) this.listenTime(card);
        if (!own) card.plot.on("plotly_click", ({ points }) => this.scrubber.go(this.scrubber.nearest(points[0].x)));
      };
    }
  }

  // A heat map may take the whole width, and the height that its rows need.
  expander(card) {
    const onclick = () => {
      card.wide = !card.wide;
      card.element.classList.toggle("wide", card.wide);
      button.setAttribute("aria-pressed", String(card.wide));
      this.arrange();
      this.painter.touch(card.name);
    };
    const button = h("button", { type: "button", class: "wi-expand", title: "Enlarge", "aria-label": `Enlarge ${card.name}`, "aria-pressed": "false", onclick }, "⤢");
    return button;
  }

  drawChoice() {
    const layers = this.store.facts.get("layers") ?? {};
    const { layer = null, module = null, quantity = "norm" } = this.store.facts.get("choice") ?? {};
    for (const [kind, picker] of Object.entries(this.pickers)) {
      const names = layers[kind] ?? [];
      const key = names.join("\n");
      if (picker.dataset.key !== key) {
        picker.dataset.key = key;
        picker.replaceChildren(h("option", { value: "" }, "pick a layer"), ...names.map((n) => h("option", { value: n }, n)));
      }
      picker.hidden = !names.length;
      picker.value = kind === "gradients" ? layer ?? "" : module ?? "";
      if (picker.selectedIndex < 0) picker.value = "";
    }
    const known = this.store.facts.get("quantities") ?? [];
    const key = known.map(({ name }) => name).join();
    if (this.quantities.dataset.key !== key) {
      this.quantities.dataset.key = key;
      this.quantities.replaceChildren(...known.map(({ name, label, meaning }) => h("option", { value: name, title: meaning }, label)));
    }
    this.quantities.hidden = known.length < 2;
    this.quantities.value = quantity;
    this.quantity = known.find(({ name }) => name === quantity) ?? { name: "norm", label: "Norm", log: true, block: "norm", meaning: "" };
    this.quantities.title = this.quantity.meaning;
    this.layer = layer;
    this.module = module;
    this.detail.hidden = !layer;
    this.detailTitle.textContent = layer ?? "";
    this.cards.values.title.textContent = module ? `Outputs of ${module}` : "Distribution of outputs";
    this.parameter = this.parameterOf(layer, layers.gradients ?? []);
    const what = this.quantity.name === "norm" ? "Gradient norm" : `Gradient: ${this.quantity.label.toLowerCase()}`;
    this.cards.norm.title.textContent = this.parameter ? `${what} of ${this.parameter}` : what;
  }

  // The layer's own gradient row, or for a module that of its weight, or of its first parameter.
  parameterOf(layer, names) {
    if (!layer || names.includes(layer)) return layer;
    const own = names.filter((n) => n.startsWith(`${layer}.`));
    return own.find((n) => n.endsWith(".weight")) ?? own[0] ?? null;
  }

  // A row of a heat map was pressed: a block opens or closes, a layer shows its history.
  press(kind, row) {
    if (!row.block) return this.choose(row.name === this.layer ? null : row.name);
    const opened = this.opened[kind];
    opened[opened.has(row.block) ? "delete" : "add"](row.block);
    this.painter.touch(kind);
  }
}
