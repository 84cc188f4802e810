"use strict";
(() => {
  const tip = document.getElementById("tip");
  const attempts = document.getElementById("attempts");
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
  }

  function filter(name) {
    attempts.dataset.show = name;
    for (const button of document.querySelectorAll(".filter button")) {
      button.setAttribute("aria-pressed", String(button.dataset.show === name));
    }
  }

  for (const dot of document.querySelectorAll("a.dot")) {
    dot.addEventListener("pointerenter", () => show(dot));
    dot.addEventListener("focus", () => show(dot));
    dot.addEventListener("pointerleave", () => { tip.hidden = true; });
    dot.addEventListener("blur", () => { tip.hidden = true; });
  }
  attempts.addEventListener("toggle", (event) => {
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
