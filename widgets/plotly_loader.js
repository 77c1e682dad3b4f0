// Brings plotly.js to the page once: the kernel sends it compressed, and only to a page that lacks it.

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
