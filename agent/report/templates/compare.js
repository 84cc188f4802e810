"use strict";
(() => {
  // Two attempts side by side: numbers, knobs, curves, and the change from one to the other, made
  // here from the baseline's files and the changes in this page.
  const MOST_CELLS = 4e6, CONTEXT = 3;
  const row = (number) => document.getElementById("a" + number);
  const pick = (name) => document.getElementById("compare-" + name);

  function make(tag, text, ...inside) {
    const made = document.createElement(tag);
    made.append(text, ...inside);
    return made;
  }

  const lines = (element) => element.textContent.replace(/\n$/, "").split("\n");

  // The files after a unified diff; null where it does not fit. Counts tell a hunk's lines from
  // the names between hunks: a line that was taken away may look like a name.
  function applied(files, change) {
    const made = new Map(files);
    let name = null, out = [], at = 0, take = 0, give = 0;
    const close = () => { if (name !== null) made.set(name, out.concat((files.get(name) ?? []).slice(at))); };
    for (const line of change) {
      const hunk = take + give === 0 && /^@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@/.exec(line);
      if (hunk) {
        [take, give] = [Number(hunk[2] ?? 1), Number(hunk[3] ?? 1)];
        const start = Math.max(0, Number(hunk[1]) - (take ? 1 : 0));
        out.push(...(files.get(name) ?? []).slice(at, start));
        at = start;
      } else if (take + give === 0) {
        if (line.startsWith("+++ ")) { close(); [name, out, at] = [line.slice(6), [], 0]; }
      } else if (line[0] === "\\") {
        continue;
      } else {
        if (line[0] !== "+") {
          if ((files.get(name) ?? [])[at] !== line.slice(1)) return null;
          at += 1;
          take -= 1;
        }
        if (line[0] !== "-") { out.push(line.slice(1)); give -= 1; }
      }
    }
    close();
    return made;
  }

  function filesOf(number, left = 1000) {
    const one = row(number);
    if (!one || !left) return null;
    const base = one.querySelectorAll("pre[data-file]");
    if (base.length) return new Map([...base].map((pre) => [pre.dataset.file, lines(pre)]));
    const change = one.querySelector(".body > pre.diff[data-whole]");
    const before = change && filesOf(one.dataset.parent, left - 1);
    return before && applied(before, lines(change));
  }

  // Lines of both with what became of each, by the longest common subsequence.
  function aligned(a, b) {
    let start = 0, end = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start += 1;
    while (end < a.length - start && end < b.length - start && a.at(-1 - end) === b.at(-1 - end)) end += 1;
    const n = a.length - start - end, m = b.length - start - end, width = m + 1;
    if (n * m > MOST_CELLS) return null;
    const best = new Uint16Array((n + 1) * width);
    for (let i = n - 1; i >= 0; i--) for (let j = m - 1; j >= 0; j--) {
      best[i * width + j] = a[start + i] === b[start + j]
        ? best[(i + 1) * width + j + 1] + 1 : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
    }
    const found = a.slice(0, start).map((line) => [" ", line]);
    let i = 0, j = 0;
    while (i < n || j < m) {
      if (i < n && j < m && a[start + i] === b[start + j]) { found.push([" ", a[start + i]]); i += 1; j += 1; }
      else if (j >= m || (i < n && best[(i + 1) * width + j] >= best[i * width + j + 1])) found.push(["-", a[start + i++]]);
      else found.push(["+", b[start + j++]]);
    }
    return found.concat(a.slice(a.length - end).map((line) => [" ", line]));
  }

  function difference(first, second) {
    const [before, after] = [filesOf(first), filesOf(second)];
    if (!before || !after) {
      return make("p", `A change between them is cut in this page: nightlab show NAME ${second} --against ${first} prints it.`);
    }
    const pre = make("pre", "");
    pre.className = "diff";
    pre.tabIndex = 0;
    for (const name of new Set([...before.keys(), ...after.keys()])) {
      const found = aligned(before.get(name) ?? [], after.get(name) ?? []);
      if (!found) return make("p", "They differ in too many lines to be shown here.");
      const near = found.map((_, at) => found.slice(Math.max(0, at - CONTEXT), at + CONTEXT + 1).some(([mark]) => mark !== " "));
      if (near.includes(true)) pre.append(make("b", name), "\n");
      found.forEach(([mark, line], at) => {
        if (!near[at]) return;
        if (at && !near[at - 1]) pre.append(make("i", "@@"), "\n");
        pre.append(mark === " " ? ` ${line}` : make(mark === "+" ? "ins" : "del", mark + line), "\n");
      });
    }
    if (!pre.firstElementChild) return make("p", "Their files are the same.");
    return pre;
  }

  function curves(first, second) {
    const both = [first, second].map((n) => row(n).querySelector(".body > .curve svg"));
    if (both.includes(null)) return "";
    const [low, high, last] = [["low", Math.min], ["high", Math.max], ["last", Math.max]].map(([name, of]) =>
      of(...both.map((svg) => Number(svg.dataset[name]))));
    const figure = both[0].closest("figure").cloneNode(true), svg = figure.querySelector("svg");
    for (const old of svg.querySelectorAll("polyline")) old.remove();
    both.forEach((own, index) => {
      for (const old of own.querySelectorAll("polyline:not(.beside)")) {
        const line = old.cloneNode();
        line.classList.toggle("beside", index === 0);
        line.setAttribute("points", old.getAttribute("points").split(" ").map((point) => {
          const [x, y] = point.split(",").map(Number), { low: l, high: h, last: t } = own.dataset;
          const loss = Number(l) + (78 - y) / 76 * (Number(h) - l);
          return `${(x * t / last).toFixed(1)},${(78 - (loss - low) / (high - low) * 76).toFixed(1)}`;
        }).join(" "));
        svg.append(line);
      }
    });
    const words = svg.querySelectorAll("text");
    [words[0].textContent, words[1].textContent, words[3].textContent] = [high.toPrecision(3), low.toPrecision(3), `${last.toPrecision(3)} s`];
    figure.querySelector("figcaption").textContent = `training loss: #${second}; grey: #${first}`;
    return figure;
  }

  const knobsOf = (one) => ({
    ...JSON.parse(document.querySelector('.attempt.baseline[data-knobs]')?.dataset.knobs ?? "{}"),
    ...JSON.parse(one.dataset.knobs ?? "{}"),
  });

  function table(first, second) {
    const rows = [first, second].map(row), all = rows.map(knobsOf);
    const text = (one, name) => one.querySelector(`summary ${name}`)?.textContent.trim().replace(/\s+/g, " ") ?? "";
    const made = make("table", ""), body = make("tbody", "");
    const add = (name, values) => body.append(make("tr", make("th", name), ...values.map((value) => make("td", value))));
    made.append(make("thead", make("tr", make("td", ""), ...[first, second].map((n) => make("th", `#${n}`)))), body);
    for (const head of made.querySelectorAll("thead th")) head.scope = "col";
    for (const [name, part] of [["became", ".badge"], ["score", ".v"], ["gain", ".g"], ["idea", ".idea"]]) {
      add(name, rows.map((one) => text(one, part)));
    }
    add("seconds", rows.map((one) => Number(one.dataset.seconds ?? 0).toFixed(0)));
    for (const name of new Set(all.flatMap(Object.keys))) {
      const values = all.map((knobs) => String(knobs[name] ?? "–"));
      if (values[0] !== values[1]) add(name, values);
    }
    for (const head of body.querySelectorAll("th")) head.scope = "row";
    return made;
  }

  function compare() {
    const [first, second] = ["a", "b"].map((name) => pick(name).value);
    const place = document.getElementById("compared");
    if (!row(first) || !row(second)) return place.replaceChildren();
    place.replaceChildren(table(first, second), curves(first, second), make("h3", `From #${first} to #${second}`), difference(first, second));
    document.dispatchEvent(new Event("shown"));
  }

  // Every attempt can be picked; who is picked stays so when there are more.
  function fill() {
    const numbers = [...document.querySelectorAll(".attempt")].map((one) => one.dataset.number).sort((x, y) => x - y);
    for (const name of ["a", "b"]) {
      const chosen = pick(name).value;
      pick(name).replaceChildren(make("option", ""), ...numbers.map((n) => make("option", n)));
      pick(name).value = chosen;
    }
  }

  document.addEventListener("change", (event) => { if (event.target.id?.startsWith("compare-")) compare(); });
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button[data-compare]");
    if (!button) return;
    [pick("a").value, pick("b").value] = [button.dataset.with, button.dataset.compare];
    document.getElementById("compare").open = true;
    compare();
    document.getElementById("compare").scrollIntoView({ block: "start" });
  });
  document.addEventListener("renewed", fill);
  document.getElementById("compare").hidden = false;
  fill();
})();
