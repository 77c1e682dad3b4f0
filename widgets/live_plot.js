// A live chart: curves kept by the kernel's splices, a legend with the latest values, plotly for the drawing.

function legend(el, traces, x) {
  const list = document.createElement("ul");
  list.className = "wb-legend";
  const values = new Map();
  traces.forEach((trace) => {
    const item = document.createElement("li");
    const swatch = document.createElement("i");
    swatch.setAttribute("aria-hidden", "true");
    const label = document.createElement("span");
    label.textContent = trace.label;
    const value = document.createElement("b");
    item.append(swatch, label, value);
    list.append(item);
    values.set(trace.name, { value, swatch });
  });
  el.append(list);
  return values;
}

function render({ model, el, signal, store }) {
  const options = model.get("_options");
  el.classList.add("wb-live");
  const root = document.createElement("figure");
  root.setAttribute("aria-label", options.label);
  const entries = legend(root, options.traces, options.x_title);
  const plot = document.createElement("div");
  plot.className = "wb-plot";
  plot.style.height = `${options.height}px`;
  const waiting = document.createElement("p");
  waiting.className = "wb-waiting";
  waiting.textContent = options.waiting;
  plot.append(waiting);
  root.append(plot);
  el.append(root);

  let revision = 0;
  let drawn = false;
  const draw = async () => {
    const known = options.traces.some((t) => store.lines.get(t.name)?.x.length);
    if (!known && !drawn) return;
    const Plotly = await plotlyReady();
    waiting.remove();
    const colours = theme(el);
    const data = [];
    options.traces.forEach((trace, index) => {
      const held = store.lines.get(trace.name) ?? { x: [], y: [] };
      const colour = trace.color ?? colours.ink[index % colours.ink.length];
      const entry = entries.get(trace.name);
      entry.swatch.style.background = colour;
      const last = held.y.findLastIndex((v) => v !== null);
      entry.value.textContent = last < 0 ? "–" : compact(held.y[last]);
      const common = {
        type: "scatter",
        mode: trace.mode,
        x: held.x,
        yaxis: trace.axis === 2 ? "y2" : "y",
        name: trace.label,
        line: { color: colour, width: 1.75, dash: trace.dash ?? "solid" },
        marker: { color: colour, size: 6 },
        connectgaps: false,
      };
      if (trace.smooth && held.y.length > 8) {
        const raw = { ...common, y: held.y, line: { color: faded(colour, 0.25), width: 1 }, hoverinfo: "skip" };
        data.push(raw, { ...common, y: smoothed(held.y, trace.smooth) });
      } else {
        data.push({ ...common, y: held.y });
      }
    });
    const second = options.traces.some((t) => t.axis === 2);
    const layout = layoutOf(colours, {
      height: options.height,
      datarevision: ++revision,
      uirevision: "kept",
      hovermode: "x unified",
      xaxis: { title: { text: options.x_title } },
      yaxis: { type: options.log_y ? "log" : "linear", exponentformat: "power", nticks: 6 },
    });
    if (options.traces.every((trace) => trace.share)) layout.yaxis.range = rangeOfShares(data.flatMap((trace) => trace.y));
    const steps = data.flatMap((trace) => trace.x);
    if (new Set(steps).size === 1) layout.xaxis.range = [0, steps[0] * 1.05]; // one point alone: keep zero in sight
    if (second) layout.yaxis2 = { ...layout.yaxis, type: "linear", overlaying: "y", side: "right", showgrid: false, tickmode: "auto" };
    await Plotly.react(plot, data, layout, CONFIG);
    drawn = true;
  };
  const painter = new Painter(root, draw, { signal, report: (times) => tell(model, { kind: "drawn", times }) });
  const touch = () => painter.touch("chart");
  store.listeners.add(touch);
  signal.addEventListener("abort", () => {
    store.listeners.delete(touch);
    if (drawn) globalThis.Plotly?.purge(plot);
  });
  touch();
}

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = follow(model);
    },
    render(view) {
      render({ ...view, store });
    },
  };
};
