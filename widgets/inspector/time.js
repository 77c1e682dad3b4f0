// Time travel: one slider for the whole page. A step is chosen, or the latest is followed.

class Scrubber {
  // `steps()` are those with readings, ascending; `choose(step)` is told the chosen one, null for the latest.
  constructor({ steps, choose }) {
    this.steps = steps;
    this.choose = choose;
    this.step = null;
    const oninput = () => this.go(this.nearest(Number(this.slider.value)));
    this.slider = h("input", { type: "range", min: 0, max: 1, step: 1, value: 0, "aria-label": "Step to show", oninput });
    this.slider.addEventListener("keydown", (event) => this.key(event));
    this.text = h("output", {});
    this.latest = h("button", { type: "button", class: "link small", title: "Follow the latest step (Esc)", onclick: () => this.go(null) }, "latest");
    this.element = h("div", { class: "wi-time", role: "group", "aria-label": "Time" }, this.slider, this.text, this.latest);
  }

  // The last reading not past a step; null for the last of all.
  nearest(step) {
    const steps = this.steps();
    const at = Math.max(0, indexAt(steps, step));
    return at >= steps.length - 1 ? null : steps[at];
  }

  by(count) {
    const steps = this.steps();
    if (!steps.length) return;
    const at = this.step === null ? steps.length - 1 : indexAt(steps, this.step);
    const next = Math.max(0, at + count);
    this.go(next >= steps.length - 1 ? null : steps[next]);
  }

  go(step) {
    if (step === this.step) return this.show();
    this.step = step;
    this.show();
    this.choose(step);
  }

  // Arrow keys move by a reading, with Shift by ten; Home and End to the ends; Escape follows the latest. True when used.
  key(event) {
    const size = event.shiftKey ? 10 : 1;
    const moves = { ArrowLeft: () => this.by(-size), ArrowRight: () => this.by(size), Home: () => this.by(-Infinity), End: () => this.go(null), Escape: () => this.step !== null && this.go(null) };
    if (!moves[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    moves[event.key]();
    event.preventDefault();
    event.stopPropagation();
  }

  show(header = this.header) {
    this.header = header;
    const steps = this.steps();
    this.element.hidden = !header || steps.length < 2;
    if (this.element.hidden) return;
    const last = steps.at(-1);
    const end = Math.max(header.total || 0, header.step, last);
    const shown = this.step ?? Math.max(header.step, last);
    this.slider.max = end;
    this.slider.value = shown;
    this.slider.style.setProperty("--done", `${(100 * Math.max(header.step, last)) / end}%`);
    this.slider.style.setProperty("--at", `${(100 * shown) / end}%`);
    this.element.classList.toggle("past", this.step !== null);
    this.slider.setAttribute("aria-valuetext", `step ${shown}`);
    this.text.textContent = this.step === null ? "latest" : `step ${shown.toLocaleString("en")}`;
    this.text.hidden = this.step === null;
    this.latest.disabled = this.step === null;
    this.latest.textContent = this.step === null ? (FINISHED.includes(header.status) ? "at the end" : "following") : "go to the latest";
  }
}
