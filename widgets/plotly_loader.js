// Brings plotly.js to the page once: the kernel sends it compressed, and only to a page that lacks it.
function slot() {
  const key = "workbenchPlotly";
  if (!globalThis[key]) {
    let resolve;
    const promise = new Promise((done) => (resolve = done));
    globalThis[key] = { promise, resolve, started: false };
  }
  return globalThis[key];
}

async function evaluate(compressed) {
  const stream = new Blob([compressed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const source = await new Response(stream).text();
  // Hide module loaders from the bundle, so that it sets the global.
  const wrapped = `(function (module, exports, define) {${source}\n}).call(globalThis);`;
  const url = URL.createObjectURL(new Blob([wrapped], { type: "text/javascript" }));
  try {
    await new Promise((done, fail) => {
      const script = document.createElement("script");
      Object.assign(script, { src: url, onload: done, onerror: () => fail(new Error("plotly.js could not be loaded")) });
      document.head.append(script);
    });
  } finally {
    URL.revokeObjectURL(url);
  }
}

export default {
  initialize({ model }) {
    const page = slot();
    if (globalThis.Plotly?.react) page.resolve(globalThis.Plotly);
    model.on("msg:custom", async (content, buffers) => {
      if (globalThis.Plotly?.react || page.started) return;
      page.started = true;
      try {
        await evaluate(buffers[0]);
        page.resolve(globalThis.Plotly);
      } catch (error) {
        page.started = false;
        console.error("[workbench]", error);
      }
    });
    model.send({ loaded: Boolean(globalThis.Plotly?.react) || page.started });
  },
  render({ el }) {
    el.style.display = "none";
  },
};
