"use strict";
(() => {
  const tip = document.getElementById("tip");
  const attempts = () => document.getElementById("attempts");
  const attempt = (number) => document.getElementById("a" + number);

  function words(number) {
    const row = attempt(number).querySelector("summary");
    const text = (name) => row.querySelector(name).textContent.trim().replace(/\s+/g, " ");
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

  function open(number) {
    const details = attempt(number);
    if (!details) return;
    if (getComputedStyle(details).display === "none") filter("all");
    details.open = true;
    details.scrollIntoView({ block: "start" });
    details.querySelector("summary").focus({ preventScroll: true });
  }

  function filter(name) {
    attempts().dataset.show = name;
    for (const button of document.querySelectorAll(".filter button")) {
      button.setAttribute("aria-pressed", String(button.dataset.show === name));
    }
  }

  function hide() { tip.hidden = true; }

  function step(dot, by) {
    const dots = [...dot.ownerSVGElement.querySelectorAll("a.dot")];
    dots.sort((one, other) => one.dataset.n - other.dataset.n);
    const next = dots[dots.indexOf(dot) + by];
    if (next) next.focus();
  }

  const steps = { ArrowRight: 1, ArrowLeft: -1 };
  const dotOf = (event) => event.target.closest?.("a.dot");
  for (const kind of ["pointerover", "focusin"]) {
    document.addEventListener(kind, (event) => { if (dotOf(event)) show(dotOf(event)); });
  }
  for (const kind of ["pointerout", "focusout"]) {
    document.addEventListener(kind, (event) => { if (dotOf(event)) hide(); });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const dot = dotOf(event);
    if (!dot || !steps[event.key]) return;
    event.preventDefault();
    step(dot, steps[event.key]);
  });
  document.addEventListener("toggle", (event) => {
    if (!event.target.matches(".attempt")) return;
    for (const log of event.target.querySelectorAll(".log")) log.scrollTop = log.scrollHeight;
  }, true);
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#a"]');
    if (link) open(link.getAttribute("href").slice(2));
    const button = event.target.closest(".filter button");
    if (button) filter(button.dataset.show);
  });
  document.querySelector(".filter").hidden = false;
  if (location.hash.startsWith("#a")) open(location.hash.slice(2));
})();
