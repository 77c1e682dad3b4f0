// The Inspector as a file: unpacks what it holds, and answers the page's questions in the kernel's place.

class Offline {
  constructor() {
    this.offline = true;
    this.store = new Store();
  }

  on() {}

  off() {}

  // The first buffer ends at a zero byte: operations as JSON, then their values.
  open(bytes) {
    const end = bytes.indexOf(0);
    const operations = JSON.parse(new TextDecoder().decode(bytes.subarray(0, end)));
    this.store.receive({ kind: "frame", whole: true, sequence: 0, operations }, [bytes.subarray(end + 1)]);
    for (const store of this.stores()) this.showStep(store, null);
  }

  stores() {
    return [this.store, this.store.beside].filter(Boolean);
  }

  send({ kind, value }) {
    const changed = { layer: ["choice", "layer"], quantity: ["choice"], time: ["activations"] }[kind];
    if (!changed) return;
    for (const store of this.stores()) {
      if (kind === "layer") this.showLayer(store, value);
      if (kind === "quantity") store.facts.set("choice", { ...store.facts.get("choice"), quantity: value });
      if (kind === "time") this.showStep(store, value);
    }
    for (const listener of this.store.listeners) listener(new Set(changed), false);
  }

  showLayer(store, layer) {
    const { gradients = [], activations = [] } = store.facts.get("layers") ?? {};
    const known = gradients.includes(layer) || activations.includes(layer) ? layer : null;
    const module = known && [known, known.slice(0, Math.max(0, known.lastIndexOf(".")))].find((name) => activations.includes(name));
    store.facts.set("choice", { ...store.facts.get("choice"), layer: known, module: module ?? null });
    store.grids.delete("layer");
    const history = store.histories.get("activations");
    if (!module || !history) return;
    const { rows, bins, x, fullest, bytes } = history;
    const row = activations.indexOf(module);
    const columns = Array.from(x, (_, c) => {
      const levels = bytes.subarray((c * rows + row) * bins, (c * rows + row + 1) * bins);
      return Float32Array.from(levels, (level) => (level / 255) ** 2 * fullest[c * rows + row]);
    });
    store.grids.set("layer", { rows: bins, x: [...x], columns });
  }

  showStep(store, step) {
    const history = store.histories.get("activations");
    if (!history) return;
    const { rows, bins, stats, x, told, bytes } = history;
    const at = step === null ? x.length - 1 : Math.max(0, indexAt(x, step));
    const part = (all, each) => all.subarray(at * each, (at + 1) * each);
    store.levelsOf.set("activations", { rows, bins, step: x[at], at, of: x.length, bytes: part(bytes, rows * bins), stats: part(told, rows * stats) });
  }
}

async function unpacked(id) {
  const element = document.getElementById(id);
  const packed = Uint8Array.from(atob(element.textContent), (character) => character.charCodeAt(0));
  element.remove();
  return packed;
}

async function inflated(packed) {
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// Light or dark as the reader's system is, until the reader chooses.
function themed() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const set = (dark) => (document.body.dataset.jpThemeLight = String(!dark));
  const onclick = () => set(document.body.dataset.jpThemeLight === "true");
  set(system.matches);
  system.addEventListener("change", ({ matches }) => set(matches));
  return h("button", { type: "button", class: "wi-theme", title: "Light or dark", "aria-label": "Light or dark", onclick }, "◐");
}

async function show() {
  const main = document.querySelector("main");
  const model = new Offline();
  const button = themed();
  model.open(await inflated(await unpacked("data")));
  const view = new View({ model, el: main, signal: new AbortController().signal, store: model.store });
  view.words.stats.after(button);
  await evaluate(await unpacked("plotly"));
  slot().resolve(globalThis.Plotly);
}

show();
