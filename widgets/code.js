// Python code that can be read and copied. Copying falls back to a selection when the clipboard is closed to us.

const TOKENS = /(#[^\n]*)|("(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')|\b(from|import|as|with|for|in|if|else|and|or|not|return|def|lambda|None|True|False)\b|\b(\d+(?:\.\d*)?(?:e[-+]?\d+)?|\.\d+)\b/g;
const KINDS = ["comment", "string", "keyword", "number"];

function highlighted(text) {
  const fragment = document.createDocumentFragment();
  let end = 0;
  for (const match of text.matchAll(TOKENS)) {
    fragment.append(text.slice(end, match.index));
    const span = document.createElement("span");
    span.className = `wb-code-${KINDS[match.slice(1).findIndex((group) => group !== undefined)]}`;
    span.textContent = match[0];
    fragment.append(span);
    end = match.index + match[0].length;
  }
  fragment.append(text.slice(end));
  return fragment;
}

async function copy(text, element) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = document.createElement("textarea");
    area.value = text;
    area.style.cssText = "position:fixed;opacity:0";
    element.append(area);
    area.select();
    try {
      return document.execCommand("copy");
    } catch {
      return false;
    } finally {
      area.remove();
    }
  }
}

function render({ model, el }) {
  el.classList.add("wb", "wb-code");
  const title = document.createElement("span");
  title.className = "quiet small grow nowrap";
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  const head = document.createElement("div");
  head.className = "row";
  head.append(title, button);
  const body = document.createElement("pre");
  body.tabIndex = 0;
  body.setAttribute("aria-label", "Code of this action");
  el.append(head, body);

  const update = () => {
    title.textContent = model.get("title");
    body.replaceChildren(highlighted(model.get("code")));
  };
  update();
  model.on("change", update);

  let timer;
  button.addEventListener("click", async () => {
    const copied = await copy(model.get("code"), el);
    if (!copied) getSelection().selectAllChildren(body);
    button.textContent = copied ? "Copied" : "Press Ctrl+C";
    clearTimeout(timer);
    timer = setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return () => model.off("change", update);
}

export default { render };
