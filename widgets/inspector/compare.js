// Two runs: the chooser, the line that says what is compared, and the settings that differ.

class Comparison {
  constructor({ ask }) {
    this.ask = ask;
    this.runs = [];
    const onchange = (event) => {
      event.target.blur();
      this.ask("beside", event.target.value || null);
    };
    this.chooser = h("select", { class: "wi-pick", "aria-label": "Run to compare with", onchange, onfocus: () => this.ask("runs") });
    this.strip = h("section", { class: "wi-beside", "aria-label": "Comparison", hidden: true });
    this.open = false;
    this.fill();
  }

  offer(runs) {
    this.runs = runs;
    this.fill();
  }

  fill() {
    const current = this.header?.name ?? "";
    const names = current && !this.runs.includes(current) ? [current, ...this.runs] : this.runs;
    this.chooser.replaceChildren(h("option", { value: "" }, current ? "no comparison" : "Compare with…"), ...names.map((name) => h("option", { value: name }, name)));
    this.chooser.value = current;
    this.chooser.title = current;
    this.chooser.hidden = !names.length;
  }

  show(run, other, differences) {
    if (this.header?.name !== other?.name) {
      this.header = other;
      this.fill();
    }
    this.strip.hidden = !other;
    if (!other) return;
    const swatch = (dash) => h("i", { class: dash ? "dashed" : "", "aria-hidden": "true" });
    const one = h("p", {}, swatch(false), h("b", {}, run.name));
    const two = h("p", {}, swatch(true), h("b", {}, other.name), h("span", { class: "quiet" }, `${other.status}, step ${other.step.toLocaleString("en")}`));
    const count = differences.length;
    const words = count ? `${count} ${count === 1 ? "setting differs" : "settings differ"}` : "the same settings";
    const cell = (tag, text, own = {}) => h(tag, own, text);
    const rows = differences.map((values) => h("tr", {}, ...values.map((text, i) => cell("td", text, i ? {} : { class: "quiet" }))));
    const head = h("thead", {}, h("tr", {}, ...["setting", "this run", "the other"].map((text) => cell("th", text, { scope: "col" }))));
    const table = h("div", { class: "scroll" }, h("table", {}, head, h("tbody", {}, ...rows)));
    const ontoggle = (event) => (this.open = event.target.open);
    const more = count ? h("details", { open: this.open, ontoggle }, h("summary", { class: "small" }, words), table) : h("p", { class: "quiet small" }, words);
    const key = JSON.stringify([run.name, other.name, other.status, other.step, differences]);
    if (key === this.key) return;
    this.key = key;
    this.strip.replaceChildren(one, two, more);
  }
}
