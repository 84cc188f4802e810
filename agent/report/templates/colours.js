"use strict";
(() => {
  // Colours in changes, when they are first shown: comments, texts, numbers, words of Python.
  const TOKENS = /(#.*$)|("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')|\b(\d[\w.]*)|\b(and|as|assert|async|await|break|class|continue|def|del|elif|else|except|finally|for|from|global|if|import|in|is|lambda|nonlocal|not|or|pass|raise|return|try|while|with|yield|None|True|False)\b/gm;
  const KINDS = ["com", "str", "lit", "key"];

  function colour(node) {
    const text = node.data, pieces = [];
    let at = 0;
    for (const found of text.matchAll(TOKENS)) {
      const span = document.createElement("span");
      span.className = KINDS[found.slice(1).findIndex((group) => group !== undefined)];
      span.textContent = found[0];
      pieces.push(text.slice(at, found.index), span);
      at = found.index + found[0].length;
    }
    if (pieces.length) node.replaceWith(...pieces, text.slice(at));
  }

  function show() {
    for (const pre of document.querySelectorAll("pre.diff:not(.coloured)")) {
      if (!pre.offsetHeight) continue;
      pre.classList.add("coloured");
      const walker = document.createTreeWalker(pre, NodeFilter.SHOW_TEXT), nodes = [];
      while (walker.nextNode()) if (!walker.currentNode.parentElement.matches("b, i")) nodes.push(walker.currentNode);
      nodes.forEach(colour);
    }
  }

  document.addEventListener("toggle", show, true);
  document.addEventListener("shown", show);
  document.addEventListener("renewed", show);
  show();
})();
