// The Inspector in a notebook: one store a model, a view a cell that shows it.

export default () => {
  let store;
  return {
    initialize({ model }) {
      store = follow(model);
    },
    render({ model, el, signal }) {
      new View({ model, el, signal, store });
    },
  };
};
