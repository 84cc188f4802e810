"use strict";
(() => {
  const QUICK_MS = 1000, SLOW_MS = 10000, AFTER_LOSS_MS = 3000;
  const pill = document.getElementById("live");
  let version = Number(document.body.dataset.version);

  function say(text, kind) {
    pill.textContent = text;
    pill.className = kind;
  }

  // The nodes of a server's HTML; nothing in it runs, and the page's policy allows no other script.
  const nodes = (html) => new DOMParser().parseFromString(html, "text/html").body;

  function openOnes(place) {
    return [...place.querySelectorAll("details[open][id]")].map((details) => details.id);
  }

  function focusIn(place) {
    const focused = document.activeElement;
    if (!place.contains(focused)) return null;
    if (focused.dataset.n) return `svg.${focused.closest("svg").classList[1]} a.dot[data-n="${focused.dataset.n}"]`;
    if (focused.id) return `#${focused.id}`;
    const details = focused.closest("details[id]");
    return details && focused.matches("summary") ? `#${details.id} > summary` : null;
  }

  function replace(name, html) {
    const isAttempt = /^\d+$/.test(name);
    const old = document.getElementById((isAttempt ? "a" : "p-") + name);
    const fresh = nodes(html);
    if (!old) {
      if (isAttempt) place(fresh.firstElementChild, Number(name));
      return;
    }
    const open = openOnes(old).concat(isAttempt && old.open ? [old.id] : []);
    const focused = focusIn(old);
    if (isAttempt) old.replaceWith(fresh.firstElementChild);
    else old.replaceChildren(...fresh.childNodes);
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    if (focused) document.querySelector(focused)?.focus({ preventScroll: true });
  }

  function place(fresh, number) {
    const list = document.getElementById("attempts");
    const next = [...list.children].find((row) => Number(row.id.slice(1)) > number);
    list.insertBefore(fresh, next ?? null);
  }

  // What the reader looks at stays where it is, whatever grows above it: the attempt they are at,
  // else the first thing that begins in view.
  function keepingPlace(change) {
    const marks = [...document.querySelectorAll("main > [id], .attempt")];
    const top = (mark) => mark.getBoundingClientRect().top;
    const begins = (mark) => mark && top(mark) >= 0 && top(mark) < innerHeight;
    const own = document.activeElement?.closest(".attempt");
    const first = marks.find(begins) ?? marks.findLast((mark) => top(mark) < 0);
    const anchor = scrollY > 0 && (begins(own) ? own : first);
    const before = anchor && top(anchor);
    change();
    const after = anchor && document.getElementById(anchor.id);
    if (after) scrollBy(0, top(after) - before);
  }

  function take(news) {
    version = news.version;
    keepingPlace(() => {
      for (const [name, html] of Object.entries(news.parts)) replace(name, html);
    });
    if ("chart" in news.parts) document.getElementById("tip").hidden = true;
    if (news.count < document.querySelectorAll(".attempt").length) location.reload();
    document.dispatchEvent(new Event("renewed"));
  }

  let timer = 0;
  async function ask() {
    timer = 0;
    let next = document.hidden ? SLOW_MS : QUICK_MS;
    try {
      const answer = await fetch(`news?since=${version}`, { cache: "no-store" });
      if (answer.status === 200) take(await answer.json());
      else if (answer.status !== 204) throw new Error(String(answer.status));
      say("live", "on");
    } catch {
      say("nightlab watch does not answer", "off");
      next = AFTER_LOSS_MS;
    }
    timer = setTimeout(ask, next);
  }
  document.addEventListener("visibilitychange", () => {
    if (document.hidden || !timer) return;
    clearTimeout(timer);
    ask();
  });

  const shown = (seconds) => {
    const whole = Math.floor(seconds), minutes = Math.floor(whole / 60), hours = Math.floor(minutes / 60);
    const two = (number) => String(number).padStart(2, "0");
    if (whole < 60) return `${whole} s`;
    return hours ? `${hours} h ${two(minutes % 60)} min` : `${minutes} min ${two(whole % 60)} s`;
  };
  // The server's clock, not this one: they may lie an ssh tunnel apart.
  const ahead = Number(document.body.dataset.now) - Date.now() / 1000;
  const age = (since) => Math.max(0, Date.now() / 1000 + ahead - Number(since));
  function tick() {
    for (const clock of document.querySelectorAll("[data-since]")) {
      clock.textContent = shown(age(clock.dataset.since));
    }
    for (const bar of document.querySelectorAll("[data-bar-since]")) {
      const share = 100 * age(bar.dataset.barSince) / Number(bar.dataset.barSeconds);
      bar.querySelector(".used").setAttribute("width", Math.min(100, share).toFixed(1));
    }
  }
  document.addEventListener("renewed", tick);
  setInterval(tick, 1000);
  tick();
  ask();
})();
