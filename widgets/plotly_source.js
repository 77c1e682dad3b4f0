// plotly.js from its compressed source, once a page.

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
