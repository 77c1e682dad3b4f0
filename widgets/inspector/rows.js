// Rows of a heat map of named layers: one a layer or, where there are many, one a block, which opens into its layers.

const MANY = 40; // rows beyond which layers are drawn by their blocks
const FEW = 8; // blocks below which finer ones are drawn
const ROW = 13; // px a label takes

// "layers.1.blocks.0.attn.weight" is of the block "layers.1" at depth 1 and of "layers.1.blocks.0" at depth 2: what leads to the
// end of that many runs of numbers. Without numbers, of its module.
function blockOf(name, depth) {
  const parts = name.split(".");
  const number = (part) => /^\d+$/.test(part ?? "");
  const ends = parts.map((_, i) => i + 1).filter((i) => number(parts[i - 1]) && !number(parts[i]));
  if (ends.length) return parts.slice(0, ends[Math.min(depth, ends.length) - 1]).join(".");
  return parts.length > 1 ? parts.slice(0, -1).join(".") : name;
}

// [{ name, members }], in the order of the first member; members are indices into names.
function blocksOf(names) {
  let found;
  for (const depth of [1, 2, 3]) {
    const blocks = new Map();
    names.forEach((name, index) => {
      const key = blockOf(name, depth);
      if (!blocks.has(key)) blocks.set(key, { name: key, members: [] });
      blocks.get(key).members.push(index);
    });
    if (!found || blocks.size <= 2 * MANY) found = [...blocks.values()];
    if (found.length >= FEW) break;
  }
  return found;
}

// Rows to draw: { label, name, members, block }; `block` is set of a row that opens or closes.
function rowsOf(names, { byBlock, open }) {
  const layer = (index, label = names[index], within = false) => ({ label, name: names[index], members: [index], block: null, within });
  if (!byBlock) return names.map((_, index) => layer(index));
  return blocksOf(names).flatMap(({ name, members }) => {
    if (members.length === 1) return [layer(members[0])];
    const row = { label: `${open.has(name) ? "▾" : "▸"} ${name}`, name, members, block: name };
    if (!open.has(name)) return [row];
    return [row, ...members.map((index) => layer(index, names[index].slice(name.length + 1) || names[index], true))];
  });
}

// Values of a row at a column of a grid: the layer's own, or the block's as one.
const MERGED = {
  norm: (values) => Math.sqrt(values.reduce((sum, v) => sum + v * v, 0)),
  max: (values) => values.reduce((a, b) => Math.max(a, b), 0),
  mean: (values) => values.reduce((sum, v) => sum + v, 0) / values.length,
};

function rowValue(column, members, how) {
  if (members.length === 1) return column[members[0]];
  const known = [];
  for (const index of members) if (!Number.isNaN(column[index])) known.push(column[index]);
  return known.length ? MERGED[how](known) : NaN;
}

// Labels beside the rows, as buttons: for as many rows as fit, blocks before layers. Returns the width that they take.
class RowLabels {
  constructor(card, choose) {
    this.card = card;
    this.choose = choose;
    this.element = h("div", { class: "wi-rows" });
    card.frame.append(this.element);
  }

  width(rows) {
    const longest = rows.reduce((most, { label }) => Math.max(most, label.length), 0);
    return Math.round(Math.max(48, Math.min(6.6 * longest + 12, Math.max(96, 0.34 * this.card.width), 260)));
  }

  draw(rows, { top, height, width, chosen }) {
    const key = JSON.stringify([rows.map((row) => row.label), top, height, width, chosen]);
    if (key === this.key) return;
    this.key = key;
    const each = height / Math.max(1, rows.length);
    const every = Math.max(1, Math.ceil(ROW / each));
    const labels = [];
    let free = -Infinity;
    rows.forEach((row, index) => {
      const middle = (index + 0.5) * each;
      const due = index % every === 0 || row.block || row.name === chosen;
      if (!due || middle - free < ROW - 0.5) return;
      free = middle;
      const text = shortened(row.label, Math.floor((width - 10) / 6.5));
      const expanded = row.block ? String(row.label.startsWith("▾")) : null;
      const own = { type: "button", title: row.name, "aria-expanded": expanded, class: `${row.name === chosen ? "chosen" : ""} ${row.within ? "within" : ""}` };
      const label = h("button", { ...own, onclick: () => this.choose(row) }, text);
      label.style.top = `${top + middle - ROW / 2}px`;
      labels.push(label);
    });
    this.element.style.width = `${width - 6}px`;
    this.element.replaceChildren(...labels);
  }

  clear() {
    this.key = null;
    this.element.replaceChildren();
  }
}
