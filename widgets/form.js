// Draws a form from the schema of a Config class. Python holds the truth: what is typed goes to `_raw`, what is wrong comes back
// in `_errors`. A field being typed into is never overwritten.

let serial = 0;

function node(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

// The stops of a logarithmic slider: a few per decade for real numbers, powers of two for whole ones, zero first if allowed.
function logStops(spec) {
  const around = Math.abs(Number(spec.default)) || 0;
  const low = spec.low > 0 ? spec.low : around ? 10 ** (Math.floor(Math.log10(around)) - 3) : 1e-6;
  const stops = [];
  let high;
  if (spec.integer) {
    high = Math.min(spec.high ?? Infinity, Math.max(around * 32, 1024));
    for (let x = 1; x <= high; x *= 2) if (x >= low) stops.push(x);
  } else {
    high = Math.min(spec.high ?? Infinity, around ? 10 ** (Math.ceil(Math.log10(around)) + 2) : 1);
    for (let decade = Math.floor(Math.log10(low)); decade <= Math.ceil(Math.log10(high)); decade++) {
      for (const digit of [1, 1.5, 2, 3, 5, 7]) stops.push(Number((digit * 10 ** decade).toPrecision(2)));
    }
  }
  const inside = stops.filter((x) => x >= low && x <= high && !(spec.low_open && x <= spec.low));
  if (!(spec.low > 0) && !spec.low_open && spec.low !== undefined) inside.unshift(0);
  return inside;
}

const nearest = (stops, value) => stops.reduce((best, stop, i) => (Math.abs(stop - value) < Math.abs(stops[best] - value) ? i : best), 0);

function stepped(spec, text, direction, stops) {
  const value = Number(text);
  if (!Number.isFinite(value) || text === "") return text;
  if (stops) {
    const next = direction > 0 ? stops.find((stop) => stop > value) : stops.findLast((stop) => stop < value);
    return next === undefined ? text : String(next);
  }
  const step = spec.step ?? (spec.integer ? 1 : 10 ** (Math.ceil(Math.log10(Math.abs(value) || 1)) - 1));
  let next = Number((value + direction * step).toPrecision(12));
  if (spec.high !== undefined) next = Math.min(next, spec.high);
  if (spec.low !== undefined) next = Math.max(next, spec.low);
  return String(next);
}

// A text input with a list of names to choose from: filtered by what is typed, whole when just opened.
function combobox(input, names, choose) {
  const list = node("ul", { class: "wb form-list", role: "listbox", id: `${input.id}-list`, popover: "manual" });
  input.setAttribute("role", "combobox");
  input.setAttribute("aria-autocomplete", "list");
  input.setAttribute("aria-expanded", "false");
  input.setAttribute("aria-controls", list.id);
  input.setAttribute("autocomplete", "off");
  let shown = [], active = -1, typed = false;

  const close = () => {
    if (list.matches(":popover-open")) list.hidePopover();
    list.remove();
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
    active = -1;
  };
  const mark = (index) => {
    active = index;
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === index)));
    list.children[index]?.scrollIntoView({ block: "nearest" });
    if (index >= 0) input.setAttribute("aria-activedescendant", `${list.id}-${index}`);
  };
  const open = async () => {
    const all = await names();
    if (document.activeElement !== input) return;
    const wanted = typed ? input.value.trim().toLowerCase() : "";
    const rank = (name) => (name.toLowerCase().startsWith(wanted) ? 0 : 1);
    shown = all.filter((name) => name.toLowerCase().includes(wanted));
    if (wanted) shown.sort((a, b) => rank(a) - rank(b));
    shown = shown.slice(0, 200);
    if (!shown.length) return close();
    list.replaceChildren(
      ...shown.map((name, i) => node("li", { role: "option", id: `${list.id}-${i}`, "aria-selected": "false", class: name === input.value ? "current" : "" }, name)),
    );
    if (!list.isConnected) input.after(list);
    if (!list.matches(":popover-open")) list.showPopover();
    const box = input.getBoundingClientRect(), below = window.innerHeight - box.bottom;
    Object.assign(list.style, { left: `${box.left}px`, minWidth: `${box.width}px`, top: "", bottom: "" });
    if (below > 160) Object.assign(list.style, { top: `${box.bottom + 2}px`, maxHeight: `${Math.min(280, below - 12)}px` });
    else Object.assign(list.style, { bottom: `${window.innerHeight - box.top + 2}px`, maxHeight: `${Math.min(280, box.top - 12)}px` });
    input.setAttribute("aria-expanded", "true");
    mark(-1);
  };
  const pick = (name) => {
    input.value = name;
    typed = false;
    close();
    choose(name);
  };
  list.addEventListener("mousedown", (event) => {
    event.preventDefault();
    const item = event.target.closest("li");
    if (item) pick(item.textContent);
  });
  input.addEventListener("focus", () => { typed = false; });
  input.addEventListener("click", open);
  input.addEventListener("input", () => { typed = true; open(); });
  input.addEventListener("blur", close);
  input.addEventListener("keydown", (event) => {
    const isOpen = list.isConnected;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!isOpen) return open();
      mark((active + (event.key === "ArrowDown" ? 1 : shown.length - (active < 0 ? 0 : 1))) % shown.length);
    } else if (event.key === "Enter" && isOpen && active >= 0) pick(shown[active]);
    else if (event.key === "Escape" && isOpen) { event.stopPropagation(); close(); }
  });
  window.addEventListener("scroll", (event) => { if (list.isConnected && !list.contains(event.target)) close(); }, { capture: true, signal: input.wbSignal });
}

function render({ model, el }) {
  const ending = new AbortController();
  const schema = model.get("_schema");
  const controls = new Map(); // path -> { show(raw), error(text), spec }
  const groups = new Map(); // path -> { details, refresh }
  const names = new Map(); // choices -> promise of names
  el.classList.add("wb", "wb-form");
  el.dataset.lmSuppressShortcuts = "true";

  const edit = (path, raw) => {
    if (model.get("_raw")[path] === raw) return;
    model.set("_raw", { ...model.get("_raw"), [path]: raw });
    model.save_changes();
    refreshChanged();
  };

  const suggest = (choices) => {
    if (!names.has(choices)) {
      names.set(choices, new Promise((resolve) => {
        const receive = (message) => {
          if (message.choices !== choices) return;
          model.off("msg:custom", receive);
          resolve(message.names);
        };
        model.on("msg:custom", receive);
        model.send({ suggest: choices });
      }));
    }
    return names.get(choices);
  };

  function field(spec, label = spec.label) {
    const id = `wb-form-${++serial}`;
    const described = { "aria-describedby": `${id}-help ${id}-error` };
    let input, extra, show;
    if (spec.control === "switch") {
      input = node("input", { id, type: "checkbox", ...described, onchange: () => edit(spec.path, input.checked) });
      show = (raw) => { input.checked = Boolean(raw); };
    } else if (spec.control === "select") {
      const options = spec.options.map((option) => node("option", { value: option }, option || "default"));
      input = node("select", { id, ...described, onchange: () => edit(spec.path, input.value) }, ...options);
      show = (raw) => { input.value = raw; };
    } else {
      const mode = spec.control === "number" ? (spec.integer ? "numeric" : "decimal") : undefined;
      input = node("input", { id, type: "text", inputmode: mode, placeholder: spec.placeholder || undefined, spellcheck: "false", autocomplete: "off", ...described });
      input.wbSignal = ending.signal;
      let timer;
      const commit = () => { clearTimeout(timer); edit(spec.path, input.value); };
      // A half-typed name is no name: names are checked once chosen or left, numbers as they are typed.
      if (!spec.choices) input.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(commit, 150); });
      input.addEventListener("change", commit);
      show = (raw) => { input.value = input.title = raw ?? ""; };
      if (spec.control === "number") {
        const stops = spec.log ? logStops(spec) : null;
        input.addEventListener("keydown", (event) => {
          if (event.key !== "ArrowUp" && event.key !== "ArrowDown") return;
          event.preventDefault();
          input.value = stepped(spec, input.value, event.key === "ArrowUp" ? 1 : -1, stops);
          follow();
          commit();
        });
        let follow = () => {};
        if (stops) {
          extra = node("input", { type: "range", min: 0, max: stops.length - 1, step: 1, "aria-label": `${label}, slider` });
          extra.addEventListener("input", () => {
            input.value = String(stops[extra.value]);
            extra.setAttribute("aria-valuetext", input.value);
            clearTimeout(timer);
            timer = setTimeout(commit, 60);
          });
          follow = () => { if (Number.isFinite(Number(input.value))) extra.value = nearest(stops, Number(input.value)); };
          input.addEventListener("input", follow);
          const plain = show;
          show = (raw) => { plain(raw); follow(); };
        }
      } else if (spec.choices || spec.options) {
        combobox(input, () => (spec.options ? Promise.resolve(spec.options) : suggest(spec.choices)), commit);
      }
    }
    const reset = node("button", {
      type: "button", class: "reset", title: `Back to the default: ${spec.default === "" ? "none" : spec.default}`, "aria-label": `Reset ${label}`,
      onclick: () => { show(spec.default); edit(spec.path, spec.default); },
    });
    const help = node("div", { class: "help", id: `${id}-help` }, spec.help);
    const problem = node("div", { class: "problem", id: `${id}-error`, role: "status" });
    const box = node("div", { class: `field ${spec.control}${extra ? " log" : ""}`, "data-path": spec.path },
      node("label", { for: id, title: `${spec.path}\n${spec.help}` }, label), reset,
      node("div", { class: "control" }, extra, input), help, problem);
    controls.set(spec.path, {
      spec, box,
      show: (raw) => { if (document.activeElement !== input && document.activeElement !== extra) show(raw); },
      error: (text) => {
        if (text) input.setAttribute("aria-invalid", "true");
        else input.removeAttribute("aria-invalid");
        box.classList.toggle("wrong", Boolean(text));
        problem.textContent = text ?? "";
      },
      disable: (off) => { input.disabled = off; if (extra) extra.disabled = off; reset.disabled = off; },
      changed: () => String(model.get("_raw")[spec.path]) !== String(spec.default),
    });
    return box;
  }

  function fold(path, title, help, content, optional) {
    const count = node("span", { class: "count" });
    const details = node("details", { class: "group", "data-group": path });
    details.open = model.get("_open").includes(path);
    details.addEventListener("toggle", () => {
      const open = model.get("_open").filter((p) => p !== path);
      model.set("_open", details.open ? [...open, path] : open);
      model.save_changes();
    });
    const toggle = optional
      ? node("input", { type: "checkbox", "aria-label": `use ${title}`, onclick: (e) => e.stopPropagation(), onchange: (e) => { edit(path, e.target.checked); if (e.target.checked) details.open = true; } })
      : null;
    details.append(node("summary", { title: help }, toggle, node("span", { class: "title" }, title), count), node("div", { class: "fields" }, ...content));
    const inside = [...details.querySelectorAll(".field")].map((box) => box.dataset.path);
    groups.set(path, {
      details, inside,
      refresh: () => {
        const changed = inside.filter((p) => controls.get(p).changed()).length;
        const wrong = inside.filter((p) => p in model.get("_errors")).length;
        count.textContent = wrong ? `${wrong} to mend` : changed ? `${changed} changed` : "";
        count.classList.toggle("bad", wrong > 0);
        if (toggle) {
          toggle.checked = Boolean(model.get("_raw")[path]);
          details.classList.toggle("absent", !toggle.checked);
        }
      },
    });
    return details;
  }

  const taken = new Set(schema.first);
  // Beside what was picked for the top, a root's own settings are folded like those of a group.
  function contents(group) {
    const plain = [], rare = [], nested = [];
    for (const member of group.members) {
      if (taken.has(member.path)) continue;
      if (member.control === "group") {
        const inner = contents(member);
        if (inner.length) nested.push(fold(member.path, member.label, member.help, inner, member.optional));
      } else (member.advanced ? rare : plain).push(field(member));
    }
    if (group === schema && taken.size && plain.length + rare.length) {
      return [...nested, fold(":general", "general", "Other settings of the run", [...plain, ...rare])];
    }
    const folded = rare.length ? [fold(`${group.path}:advanced`, "more", "Settings that rarely need a change", rare)] : [];
    return [...plain, ...nested, ...folded];
  }

  function find(group, path) {
    for (const member of group.members) {
      if (member.path === path) return member;
      if (member.control === "group" && path.startsWith(member.path + ".")) return find(member, path);
    }
    return null;
  }

  const top = node("div", { class: "fields first" });
  for (const path of schema.first) {
    const spec = find(schema, path);
    if (!spec) continue;
    const parent = path.split(".").at(-2)?.replaceAll("_", " ");
    if (spec.control === "group") top.append(fold(path, spec.label, spec.help, contents(spec), spec.optional));
    else top.append(field(spec, spec.label === "name" && parent ? parent : spec.label));
  }
  const rest = contents(schema);
  // With a choice at the top, everything else is one fold, so that the form is as short as what people change.
  const folded = taken.size && rest.length ? [fold(":all", "all settings", "Everything else that can be set", rest)] : rest;
  const general = node("div", { class: "problem general", role: "status" });
  const about = node("div", { class: "about", "aria-hidden": "true" }, schema.help);
  const tell = (event) => {
    const box = (event?.target ?? document.activeElement).closest?.(".field, .group");
    const spec = box && el.contains(box) ? find(schema, box.dataset.path ?? box.dataset.group) : null;
    about.textContent = spec ? `${spec.path}: ${spec.help}` : schema.help;
  };
  for (const event of ["focusin", "mouseover"]) el.addEventListener(event, tell);
  el.addEventListener("mouseleave", () => tell());
  el.append(top, node("div", { class: "fields rest" }, ...folded), general, about);

  const refreshChanged = () => {
    for (const control of controls.values()) control.box.classList.toggle("changed", control.changed());
    for (const group of groups.values()) group.refresh();
  };
  const refreshRaw = () => {
    for (const [path, raw] of Object.entries(model.get("_raw"))) controls.get(path)?.show(raw);
    refreshChanged();
  };
  const refreshErrors = () => {
    const errors = model.get("_errors");
    for (const [path, control] of controls) control.error(errors[path]);
    general.textContent = errors[""] ?? "";
    for (const group of groups.values()) group.refresh();
  };
  const refreshDisabled = () => { for (const control of controls.values()) control.disable(model.get("disabled")); };
  const listeners = [["change:_raw", refreshRaw], ["change:_errors", refreshErrors], ["change:disabled", refreshDisabled]];
  for (const [event, listener] of listeners) { listener(); model.on(event, listener); }
  return () => {
    ending.abort();
    for (const [event, listener] of listeners) model.off(event, listener);
  };
}

export default { render };
