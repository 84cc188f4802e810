"use strict";
(() => {
  const NEAR_PX = 28;
  const tip = document.getElementById("tip");
  const attempt = (number) => document.getElementById("a" + number);

  // The chart: what is nearest to the pointer is meant, so that nobody has to hit a dot.

  function nearest(event) {
    const chart = event.target.closest?.("svg.progress");
    if (!chart) return null;
    let found = null, least = NEAR_PX;
    for (const dot of chart.querySelectorAll("a.dot")) {
      const at = dot.getBoundingClientRect();
      const away = Math.hypot(at.x + at.width / 2 - event.clientX, at.y + at.height / 2 - event.clientY);
      if (away < least) [found, least] = [dot, away];
    }
    return found;
  }

  function words(number) {
    const row = attempt(number).querySelector("summary");
    const text = (name) => (row.querySelector(name)?.textContent ?? "").trim().replace(/\s+/g, " ");
    const score = [text(".v"), text(".g")].filter(Boolean).join("  ");
    return [`${text(".n")} ${text(".badge")}  ${score}`, text(".idea")];
  }

  function show(dot) {
    const [title, idea] = words(dot.dataset.n);
    const bold = document.createElement("b");
    bold.textContent = title;
    tip.replaceChildren(bold, idea);
    tip.hidden = false;
    const at = dot.getBoundingClientRect();
    const left = Math.min(at.left + 14, innerWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 10;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (above > 8 ? above : at.bottom + 10) + "px";
  }

  function hide() { tip.hidden = true; }

  function point(dot) {
    for (const old of document.querySelectorAll("a.dot.near")) if (old !== dot) old.classList.remove("near");
    for (const chart of document.querySelectorAll("svg.progress")) chart.classList.toggle("pointed", Boolean(dot));
    dot?.classList.add("near");
    if (dot) show(dot);
    else if (!document.activeElement?.matches?.("a.dot")) hide();
  }

  function step(dot, by) {
    const dots = [...dot.ownerSVGElement.querySelectorAll("a.dot")];
    dots.sort((one, other) => one.dataset.n - other.dataset.n);
    const next = by === Infinity ? dots.at(-1) : by === -Infinity ? dots[0] : dots[dots.indexOf(dot) + by];
    next?.focus();
  }

  // A chart is one stop for the Tab key; arrows go on from there.
  function oneStop() {
    for (const chart of document.querySelectorAll("svg.progress")) {
      const dots = [...chart.querySelectorAll("a.dot")];
      for (const dot of dots) dot.setAttribute("tabindex", dot === dots.at(-1) ? "0" : "-1");
    }
  }

  // The attempts.

  function open(number) {
    const details = attempt(number);
    if (!details) return;
    if (getComputedStyle(details).display === "none") {
      filter("all");
      document.getElementById("search").value = "";
      look();
    }
    details.open = true;
    details.scrollIntoView({ block: "start" });
    details.querySelector("summary").focus({ preventScroll: true });
  }

  function filter(name) {
    document.getElementById("attempts").dataset.show = name;
    for (const button of document.querySelectorAll(".filter button")) {
      button.setAttribute("aria-pressed", String(button.dataset.show === name));
    }
  }

  // Look for words anywhere in an attempt: its hypothesis, change, log and numbers.

  const rows = () => [...document.querySelectorAll(".attempt")];

  function look() {
    const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let found = 0;
    for (const row of rows()) {
      const text = words.length ? row.textContent.toLowerCase() : "";
      row.hidden = !words.every((word) => text.includes(word));
      found += !row.hidden;
    }
    document.getElementById("found").textContent = words.length ? `${found} found` : "";
  }

  // The best first, whichever way the metric goes; who has no such number comes last.
  function order() {
    const name = document.getElementById("order").value;
    const sign = name === "number" || (name === "score" && document.body.dataset.better === "lower") ? 1 : -1;
    const key = (row) => (row.dataset[name] === undefined ? Infinity : sign * row.dataset[name]);
    const sorted = rows().sort((one, other) => key(one) - key(other) || one.dataset.number - other.dataset.number);
    document.getElementById("attempts").append(...sorted);
  }

  // Where things are on a long page: its sections, and of many attempts every fiftieth.
  function contents() {
    const nav = document.getElementById("contents"), count = rows().length;
    const marks = [...document.querySelectorAll("main h2[id]")].map((head) => [head.id, head.textContent]);
    for (let number = 50; number < count; number += 50) if (attempt(number)) marks.push([`a${number}`, `#${number}`]);
    nav.replaceChildren(...marks.map(([id, text]) => {
      const link = document.createElement("a");
      [link.href, link.textContent] = [`#${id}`, text];
      return link;
    }));
    nav.hidden = false;
  }

  // The theme. A file: page may not be allowed to remember it.

  const themes = ["auto", "light", "dark"];

  function remembered() {
    try { return localStorage.getItem("nightlab theme"); } catch { return null; }
  }

  function dress(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    try { localStorage.setItem("nightlab theme", theme); } catch { /* it holds for this page */ }
    nameTheme();
  }

  function nameTheme() {
    const button = document.getElementById("theme");
    button.textContent = "theme: " + (document.documentElement.dataset.theme ?? "auto");
    button.hidden = false;
  }

  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  const dotOf = (event) => event.target.closest?.("a.dot");
  document.addEventListener("pointermove", (event) => point(nearest(event)));
  document.addEventListener("focusin", (event) => { if (dotOf(event)) show(dotOf(event)); });
  document.addEventListener("focusout", (event) => { if (dotOf(event)) hide(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const dot = dotOf(event);
    if (!dot || !steps[event.key]) return;
    event.preventDefault();
    step(dot, steps[event.key]);
  });
  // What scrolls can be reached by keyboard, and nothing else is a stop of its own.
  function reach() {
    for (const place of document.querySelectorAll("pre, .scroll")) {
      const scrolls = place.scrollHeight > place.clientHeight || place.scrollWidth > place.clientWidth;
      if (scrolls) place.tabIndex = 0;
      else place.removeAttribute("tabindex");
    }
  }
  addEventListener("resize", reach);

  document.addEventListener("toggle", (event) => {
    reach();
    if (!event.target.matches(".attempt")) return;
    for (const log of event.target.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
  }, true);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a.dot, a[href^="#a"]:not([href="#all"], [href="#ablation"])');
    const dot = link ? null : nearest(event);
    // The address has the attempt, so that Back returns to where it was chosen.
    if (dot) location.hash = "a" + dot.dataset.n;
    if (link || dot) open(link ? link.getAttribute("href").slice(2) : dot.dataset.n);
    const button = event.target.closest(".filter button");
    if (button) filter(button.dataset.show);
    if (event.target.id === "theme") {
      dress(themes[(themes.indexOf(document.documentElement.dataset.theme ?? "auto") + 1) % 3]);
    }
  });
  document.addEventListener("input", (event) => { if (event.target.id === "search") look(); });
  document.addEventListener("change", (event) => { if (event.target.id === "order") order(); });
  const closed = [];
  addEventListener("beforeprint", () => {
    closed.push(...document.querySelectorAll("table.chain details:not([open])"));
    for (const details of closed) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of closed.splice(0)) details.open = false;
  });
  document.addEventListener("shown", reach);
  document.addEventListener("renewed", () => { contents(); reach(); oneStop(); nameTheme(); order(); look(); });
  document.querySelector(".filter").hidden = false;
  oneStop();
  reach();
  contents();
  dress(themes.includes(remembered()) ? remembered() : "auto");
  if (/^#a\d+$/.test(location.hash)) open(location.hash.slice(2));
})();
