// Shows a model's text: paragraphs and fenced code, always as text nodes, never as markup.

const FENCE = /^ {0,3}(`{3,}|~{3,})[^`]*$/;

/**
 * Makes `element` show `text`. While a text grows, only what is new is touched: whatever the reader
 * has selected stays selected.
 *
 * @param {HTMLElement} element
 * @param {string} text
 */
export function renderText(element, text) {
  const blocks = blocksOf(text);
  blocks.forEach(({ tag, content }, index) => {
    let block = element.children[index];
    if (block?.localName !== tag) {
      const fresh = newBlock(tag);
      if (block) block.replaceWith(fresh);
      else element.append(fresh);
      block = fresh;
    }
    const node = (block.firstElementChild ?? block).firstChild;
    if (content.startsWith(node.data)) node.appendData(content.slice(node.data.length));
    else node.data = content;
  });
  while (element.children.length > blocks.length) element.lastElementChild.remove();
}

function newBlock(tag) {
  const block = document.createElement(tag);
  const inner = tag === "pre" ? block.appendChild(document.createElement("code")) : block;
  inner.append(document.createTextNode(""));
  if (tag === "pre") {
    // Long lines scroll, so the keyboard must be able to get there.
    block.tabIndex = 0;
    block.setAttribute("role", "region");
    block.setAttribute("aria-label", "Code");
  }
  return block;
}

/** Paragraphs end at a blank line; a fence lasts to its like, or to the end while text arrives. */
function blocksOf(text) {
  const blocks = [];
  let fence = "";
  let lines = [];
  const close = (tag) => {
    if (lines.length) blocks.push({ tag, content: lines.join("\n") });
    lines = [];
  };
  for (const line of text.split("\n")) {
    const mark = FENCE.exec(line)?.[1] ?? "";
    if (fence) {
      const isEnd = mark.startsWith(fence) && line.trim() === mark;
      if (isEnd) close("pre");
      else lines.push(line);
      if (isEnd) fence = "";
    } else if (mark) {
      close("p");
      fence = mark;
    } else if (line.trim() === "") {
      close("p");
    } else {
      lines.push(line);
    }
  }
  close(fence ? "pre" : "p");
  return blocks;
}
