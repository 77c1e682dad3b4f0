// HTML that Python writes, with actions sent back. New HTML is merged into what stands: an element keeps its focus, its text,
// its scroll position and its folded state, and a click that straddles an update is not lost.

function merge(old, fresh) {
  if (old.nodeType !== fresh.nodeType || old.nodeName !== fresh.nodeName || (old.dataset?.key ?? "") !== (fresh.dataset?.key ?? "")) {
    old.replaceWith(fresh);
    return;
  }
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && !(name === "open" && old.nodeName === "DETAILS")) old.removeAttribute(name);
  }
  for (const { name, value } of [...fresh.attributes]) {
    if (old.getAttribute(name) !== value && !(name === "open" && old.nodeName === "DETAILS")) old.setAttribute(name, value);
  }
  if (old.nodeName === "INPUT" || old.nodeName === "SELECT") {
    const given = fresh.getAttribute("value");
    if (given !== null && document.activeElement !== old && old.dataset.given !== given) old.value = given;
    if (given !== null) old.dataset.given = given;
    if (old.nodeName === "SELECT") mergeChildren(old, fresh);
    return;
  }
  mergeChildren(old, fresh);
}

function mergeChildren(old, fresh) {
  const before = [...old.childNodes], after = [...fresh.childNodes];
  after.forEach((node, i) => (i < before.length ? merge(before[i], node) : old.append(node)));
  before.slice(after.length).forEach((node) => node.remove());
}

function render({ model, el }) {
  el.classList.add("wb", "wb-surface");
  const root = document.createElement("div");
  root.className = "wb-surface-root";
  el.append(root);

  const update = () => {
    const template = document.createElement("template");
    template.innerHTML = model.get("html");
    mergeChildren(root, template.content);
  };
  update();
  model.on("change:html", update);

  const receive = (message) => {
    if (typeof message.page !== "string") return;
    const address = URL.createObjectURL(new Blob([message.page], { type: "text/html" }));
    window.open(address, "_blank", "noopener");
    setTimeout(() => URL.revokeObjectURL(address), 60_000);
  };
  model.on("msg:custom", receive);

  // Inputs named by data-with travel with the action, so Python keeps no copy of what is being typed.
  const send = (target) => {
    const values = {};
    for (const name of (target.dataset.with ?? "").split(" ").filter(Boolean)) {
      const input = root.querySelector(`[name="${CSS.escape(name)}"]`);
      if (input) values[name] = input.type === "checkbox" ? input.checked : input.value;
    }
    model.send({ action: target.dataset.action, value: target.dataset.value ?? "", values });
  };
  root.addEventListener("click", (event) => {
    const target = event.target.closest("[data-action]");
    if (!target || target.disabled || !root.contains(target) || target.matches("input:not([type=checkbox]), select")) return;
    if (event.target.closest("a[href]")) return;
    send(target);
  });
  root.addEventListener("keydown", (event) => {
    const target = event.target;
    if (event.key === "Enter" && target.matches("input[data-enter]")) {
      const button = root.querySelector(`[data-action="${CSS.escape(target.dataset.enter)}"]`);
      if (button && !button.disabled) send(button);
    } else if ((event.key === "Enter" || event.key === " ") && target.matches("tr[data-action], [role=option][data-action]")) {
      event.preventDefault();
      send(target);
    } else if (target.matches("[role=tab]") && ["ArrowRight", "ArrowLeft"].includes(event.key)) {
      const tabs = [...root.querySelectorAll("[role=tab]")];
      const next = tabs[(tabs.indexOf(target) + (event.key === "ArrowRight" ? 1 : tabs.length - 1)) % tabs.length];
      next.focus();
      send(next);
    }
    // JupyterLab's own shortcuts must not fire while someone types here.
    if (target.matches("input, select, textarea")) event.stopPropagation();
  });
  let timer;
  root.addEventListener("input", (event) => {
    const target = event.target;
    if (!target.dataset.input) return;
    clearTimeout(timer);
    const value = target.type === "checkbox" ? target.checked : target.value;
    timer = setTimeout(() => model.send({ action: target.dataset.input, value, values: {} }), target.matches("[type=search]") ? 120 : 0);
  });
  return () => {
    model.off("change:html", update);
    model.off("msg:custom", receive);
  };
}

export default { render };
