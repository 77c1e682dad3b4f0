// The Inspector's page: header, findings, a card a kind of reading, and the history of a chosen layer.

const HEIGHT = 232;
const WAITING = {
  loss: "waiting for the first steps…",
  gradients: "waiting for the first reading of the gradients…",
  activations: "waiting for the first reading of the activations…",
  memory: "waiting for the first reading of the memory…",
  communication: "waiting for the first steps…",
};
const MARKS = { error: "✕", warning: "▲", info: "i" };
const FINISHED = ["finished", "stopped", "failed", "lost"];

class View {
  constructor({ model, el, signal, store }) {
    Object.assign(this, { model, el, store, signal });
    el.classList.add("wb-inspector-host");
    this.root = h("div", { class: "wb wb-inspector", role: "region", "aria-label": "Inspector" });
    this.header = h("header", { class: "wi-head" });
    this.findings = h("section", { class: "wi-findings", "aria-label": "Findings", "aria-live": "polite" });
    this.cards = {
      loss: new Card("loss", "Loss", WAITING.loss, HEIGHT),
      gradients: new Card("gradients", "Gradient norms", WAITING.gradients, HEIGHT),
      activations: new Card("activations", "Activations", WAITING.activations, HEIGHT),
      memory: new Card("memory", "Memory", WAITING.memory, HEIGHT),
      communication: new Card("communication", "Time of a step", WAITING.communication, 176),
      norm: new Card("norm", "Gradient norm", "no gradient readings for this layer", 176),
      values: new Card("values", "Distribution of outputs", "no activation readings for this layer", 176),
    };
    const { norm, values, ...main } = this.cards;
    this.detailTitle = h("h3", {});
    const close = h("button", { class: "quiet", type: "button", "aria-label": "Close the layer's history", onclick: () => this.choose(null) }, "Close");
    const detailHead = h("header", {}, this.detailTitle, close);
    this.detail = h("section", { class: "wi-detail", hidden: true, "aria-label": "History of a layer" }, detailHead, norm.element, values.element);
    this.grid = h("div", { class: "wi-grid" }, ...Object.values(main).map((card) => card.element), this.detail);
    this.root.append(this.header, this.findings, this.grid);
    el.append(this.root);
    this.tip = new Tooltip(this.root);
    this.buildControls();
    const painter = { signal, report: (times) => tell(model, { kind: "drawn", times }) };
    this.painter = new Painter(this.root, (name) => this[name](theme(el)), painter);
    const changed = (names, whole) => this.changed(names, whole);
    store.listeners.add(changed);
    signal.addEventListener("abort", () => {
      store.listeners.delete(changed);
      for (const card of Object.values(this.cards)) card.purge();
    });
    this.changed(new Set(), true);
  }

  changed(names, whole) {
    const { store, painter } = this;
    if (whole || names.has("header")) this.drawHeader(store.facts.get("header"));
    if (whole || names.has("findings") || names.has("header")) this.drawFindings(store.facts.get("findings") ?? []);
    if (whole || names.has("choice") || names.has("layers")) this.drawChoice();
    const all = [...names];
    if (whole || all.some((n) => n === "loss" || n.startsWith("metric"))) painter.touch("loss");
    if (whole || all.some((n) => n.startsWith("memory"))) painter.touch("memory");
    if (whole || names.has("choice") || all.some((n) => n.startsWith("time"))) painter.touch("communication");
    if (whole || names.has("gradients")) painter.touch("gradients", "norm");
    if (whole || names.has("activations")) painter.touch("activations");
    if (whole || names.has("layer")) painter.touch("values");
    if (names.has("choice")) painter.touch("gradients", "activations", "norm", "values");
  }

  ask(kind, value) {
    tell(this.model, { kind, value });
  }

  choose(layer) {
    this.ask("layer", layer);
  }

  // -- words ---------------------------------------------------------------------------------------------------------

  drawHeader(header) {
    this.root.classList.toggle("empty", !header);
    if (!header) {
      const known = this.store.sequence !== null;
      const text = known ? "No run is open. inspector.open(run) shows one." : "connecting to the kernel…";
      this.header.replaceChildren(h("p", { class: "quiet" }, text));
      return;
    }
    const stat = (label, value, of) => h("p", {}, h("span", {}, label), h("b", {}, value, of ? h("small", {}, of) : null));
    const number = (n) => n.toLocaleString("en");
    const stats = [stat("Step", number(header.step), header.total ? ` / ${number(header.total)}` : ""), stat("Epoch", number(header.epoch))];
    if (header.rate !== null) stats.push(stat("Samples/s", number(header.rate)));
    if (header.left) stats.push(stat("Time left", header.left));
    const bar = h("progress", { max: Math.max(1, header.total), value: header.step, "aria-label": "Steps done" });
    const name = h("div", { class: "wi-name" }, h("h2", { title: header.name }, header.name), h("span", { class: `chip ${header.status}` }, header.status));
    const title = h("div", { class: "wi-title" }, name, h("p", { class: "quiet small" }, header.facts || "not started yet"));
    const parts = [title, h("div", { class: "wi-stats" }, ...stats)];
    if (header.ranks > 1) parts.push(this.rankChooser(header.ranks));
    if (this.header.contains(document.activeElement)) return; // a choice is open: the next frame draws the header
    this.header.replaceChildren(...parts, bar);
    if (header.problem) this.header.append(h("p", { class: "notice error", role: "alert" }, header.problem));
    for (const [key, text] of Object.entries(WAITING)) {
      this.cards[key].waiting.textContent = FINISHED.includes(header.status) ? "this run recorded none" : text;
    }
  }

  rankChooser(ranks) {
    const rank = this.store.facts.get("choice")?.rank ?? null;
    const option = (value, text) => h("option", { value, selected: String(rank ?? "all") === value }, text);
    const options = [option("all", "all ranks"), ...Array.from({ length: ranks }, (_, i) => option(String(i), `rank ${i}`))];
    const onchange = (event) => {
      const { value } = event.target;
      event.target.blur();
      this.ask("rank", value === "all" ? null : Number(value));
    };
    return h("label", { class: "wi-rank" }, h("span", {}, "Readings of"), h("select", { onchange, "aria-label": "Rank" }, ...options));
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
      const remedy = finding.remedy ? h("p", { class: "quiet small" }, "Try ", h("code", {}, finding.remedy)) : null;
      const code = this.applicable(finding, remedy, () => this.drawFindings(findings));
      const mark = h("i", { class: finding.severity, role: "img", "aria-label": finding.severity }, MARKS[finding.severity] ?? "i");
      return h("li", {}, mark, h("div", {}, words, remedy, code));
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

  // The button that applies a remedy, or what became of it, added to its line; the code that the button runs, where it is open.
  applicable({ name, code, applied }, line, redraw) {
    if (!line || !code) return null;
    const open = this.codeOf === name;
    const onclick = () => {
      this.codeOf = open ? null : name;
      redraw();
    };
    const act = applied
      ? h("span", { role: "status" }, applied)
      : h("button", { type: "button", class: "link", title: code, onclick: () => this.ask("apply", name) }, "Apply");
    line.append(" ", act, " ", h("button", { type: "button", class: "link", "aria-expanded": String(open), onclick }, open ? "hide code" : "code"));
    return open ? h("pre", {}, code) : null;
  }

  buildControls() {
    const pick = (kind) => {
      const onchange = (event) => this.choose(event.target.value || null);
      return h("select", { "aria-label": `Layer whose ${kind} to show over time`, onchange, class: "wi-pick", hidden: true });
    };
    this.pickers = { gradients: pick("gradients"), activations: pick("activations") };
    for (const kind of ["gradients", "activations"]) {
      const card = this.cards[kind];
      card.note = h("div", { class: "wi-note" });
      card.aside.append(card.note, this.pickers[kind]);
      card.listen = () => this.listen(kind);
    }
    const oninput = (event) => {
      const at = Number(event.target.value);
      clearTimeout(this.sliding);
      this.sliding = setTimeout(() => this.ask("time", at >= Number(event.target.max) ? null : at), 80);
    };
    this.slider = h("input", { type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "Reading to show", oninput });
    this.sliderText = h("output", {});
    this.sliderRow = h("div", { class: "wi-slider", hidden: true }, this.slider, this.sliderText);
    this.cards.activations.foot.append(this.sliderRow);
    this.memoryTotal = h("p", { hidden: true });
    this.cards.memory.foot.append(this.memoryTotal);
    this.timesText = h("p", { hidden: true });
    this.cards.communication.foot.append(this.timesText);
    this.cards.communication.element.hidden = true;
    this.cards.values.listen = () => this.listenValues();
  }

  drawChoice() {
    const layers = this.store.facts.get("layers") ?? {};
    const { layer = null, module = null } = this.store.facts.get("choice") ?? {};
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
    this.layer = layer;
    this.module = module;
    this.detail.hidden = !layer;
    this.detailTitle.textContent = layer ?? "";
    this.cards.values.title.textContent = module ? `Outputs of ${module}` : "Distribution of outputs";
    this.parameter = this.parameterOf(layer, layers.gradients ?? []);
    this.cards.norm.title.textContent = this.parameter ? `Gradient norm of ${this.parameter}` : "Gradient norm";
  }

  // The layer's own gradient row, or for a module that of its weight, or of its first parameter.
  parameterOf(layer, names) {
    if (!layer || names.includes(layer)) return layer;
    const own = names.filter((n) => n.startsWith(`${layer}.`));
    return own.find((n) => n.endsWith(".weight")) ?? own[0] ?? null;
  }

  listen(kind) {
    const { plot } = this.cards[kind];
    plot.on("plotly_click", ({ points }) => this.choose((this.store.facts.get("layers") ?? {})[kind][points[0].y]));
    plot.on("plotly_unhover", () => this.tip.hide());
    plot.on("plotly_hover", ({ points, event }) => this.tip.show(event, this[`${kind}Tip`](points[0])));
  }
}
