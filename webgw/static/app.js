// Keeps the overview fresh: one event stream, closed while the page is hidden. The page is
// whole without it. Cells are changed in place, so that neither focus nor scroll ever moves;
// when rows come or go, the sections that differ are fetched again.
"use strict";
(() => {
  const live = document.getElementById("live");
  const main = document.getElementById("main");
  let cells = new Map(); // key -> elements
  let shape = main.dataset.shape;
  let source = null;
  let lastAt = 0;
  let failed = false;
  let fetching = false;

  function index() {
    cells = new Map();
    for (const element of document.querySelectorAll("[data-k]")) {
      const key = element.dataset.k;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(element);
    }
  }

  function patch(news) {
    for (const [name, text] of Object.entries(news)) {
      const at = name.lastIndexOf("@");
      const key = at < 0 ? name : name.slice(0, at);
      for (const element of cells.get(key) || []) {
        if (at >= 0) {
          const attribute = name.slice(at + 1);
          if (element.getAttribute(attribute) !== text) element.setAttribute(attribute, text);
        } else if (element.textContent !== text) {
          element.textContent = text;
        }
      }
    }
  }

  async function refetch() {
    if (fetching) return;
    fetching = true;
    try {
      const reply = await fetch("/streamd/", { cache: "no-store" });
      if (!reply.ok) return;
      const fresh = new DOMParser().parseFromString(await reply.text(), "text/html");
      const freshMain = fresh.getElementById("main");
      for (const section of freshMain.querySelectorAll("[data-s]")) {
        const old = main.querySelector(`[data-s="${section.dataset.s}"]`);
        if (!old || old.outerHTML === section.outerHTML) continue;
        // Rows wait while somebody types a key.
        if (old.contains(document.activeElement)) continue;
        old.replaceWith(document.importNode(section, true));
      }
      shape = freshMain.dataset.shape;
      index();
    } finally {
      fetching = false;
    }
  }

  function take(event) {
    lastAt = Date.now();
    failed = false;
    const news = JSON.parse(event.data);
    patch(news.cells);
    if (news.shape !== shape) refetch().catch(() => show());
    show();
  }

  function show() {
    const quietFor = Math.round((Date.now() - lastAt) / 1000);
    let state = "on";
    let text = "live";
    if (failed) [state, text] = ["lost", "reconnecting"];
    else if (!lastAt) [state, text] = ["waiting", "connecting"];
    else if (quietFor > 4) [state, text] = ["stale", `no news for ${quietFor} s`];
    if (live.textContent !== text) live.textContent = text;
    live.className = `live ${state}`;
  }

  function open() {
    if (source || document.hidden) return;
    source = new EventSource("/streamd/events");
    source.addEventListener("snap", take);
    source.addEventListener("error", () => {
      failed = true;
      show();
      // The browser tries again by itself unless the answer was an error status.
      if (source && source.readyState === EventSource.CLOSED) {
        close();
        setTimeout(open, 2000);
      }
    });
    show();
  }

  function close() {
    if (source) source.close();
    source = null;
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : open()));
  // A page kept for the back button must not hold its connection.
  window.addEventListener("pagehide", close);
  window.addEventListener("pageshow", open);
  setInterval(() => {
    if (!document.hidden) show();
  }, 1000);
  index();
  open();
})();
