"use strict";
// Asks the server once a second, keeps what happened lately, and draws. The key stays in this tab and out of the URL.

const POLL_MS = 1000;
const RETRY_MS = 2000;
const REQUEST_MS = 8000;
const KEPT_S = 330;
const KEY = "caesura.key";

const view = { life: "", cursor: 0, windowS: 60, last: null, history: emptyHistory(), timer: 0, busy: false };

function emptyHistory() {
  return { spans: [], decisions: [], samples: [] };
}

/** sessionStorage may be forbidden; the key then lasts as long as the page. */
const memory = { key: "" };
function storedKey() {
  try { return sessionStorage.getItem(KEY) || memory.key; } catch { return memory.key; }
}
function storeKey(key) {
  memory.key = key;
  try { key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY); } catch { /* kept above */ }
}

function say(state, text) {
  byId("link").className = state;
  byId("link-text").textContent = text;
}

function notice(text) {
  byId("notice").hidden = !text;
  byId("notice").textContent = text;
}

function take(answer) {
  const engine = answer.engine;
  if (engine.life !== view.life) view.history = emptyHistory();
  view.life = engine.life;
  view.cursor = engine.cursor;
  const oldest = engine.now_s - KEPT_S;
  const moments = { spans: (span) => span.end_s, decisions: (entry) => entry.decision.now, samples: (sample) => sample.at_s };
  for (const [name, moment] of Object.entries(moments)) {
    view.history[name] = [...view.history[name], ...engine[name]].filter((event) => moment(event) >= oldest || name === "decisions").slice(-4096);
  }
  view.last = answer;
}

function draw() {
  if (!view.last) return;
  const { server, engine } = view.last;
  byId("board").hidden = byId("facts").hidden = false;
  byId("key-form").hidden = true;
  drawHeader(server, engine);
  drawTiles(view.history, engine);
  drawTree(engine);
  drawPool(view.history, engine, view.windowS);
  drawDecisions(view.history, engine);
  drawTools(engine);
  const lanes = drawLanes(view.history, engine, view.windowS);
  drawEmpty(!lanes && !engine.step, storedKey() !== "");
  notice(server.draining ? "The server is draining: it finishes what runs and takes nothing new." : "");
}

function askForKey(refused) {
  byId("board").hidden = byId("facts").hidden = true;
  byId("key-form").hidden = false;
  view.last = null;
  say("", "waiting for a key");
  notice(refused);
  byId("key").focus();
}

async function ask() {
  const headers = { accept: "application/json" };
  const key = storedKey();
  if (key) headers.authorization = `Bearer ${key}`;
  const query = new URLSearchParams({ since: String(view.cursor), life: view.life });
  return fetch(`/v1/dashboard/state?${query}`, {
    headers, cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(REQUEST_MS),
  });
}

async function poll() {
  clearTimeout(view.timer);
  if (view.busy) return;
  view.busy = true;
  let wait = POLL_MS;
  try {
    const response = await ask();
    if (response.status === 401 || response.status === 403) {
      const had = storedKey();
      storeKey("");
      const words = response.status === 403 ? "This key may not see the dashboard; it needs an admin key." : "The server does not know this key.";
      askForKey(had ? words : "");
      wait = 0;
    } else if (response.ok) {
      take(await response.json());
      draw();
      say("live", "live");
    } else {
      wait = RETRY_MS;
      say("lost", response.status === 503 ? "the engine is restarting" : `the server answers ${response.status}`);
    }
  } catch (error) {
    wait = RETRY_MS;
    say("lost", error instanceof TypeError || error instanceof DOMException ? "no connection, trying again" : `cannot draw: ${error}`);
  } finally {
    view.busy = false;
    if (wait) view.timer = setTimeout(poll, document.hidden ? 5 * wait : wait);
  }
}

function drawWindows() {
  byId("windows").replaceChildren(...WINDOWS.map(([name, length]) => {
    const button = el("button", { type: "button", "aria-pressed": String(length === view.windowS) }, name);
    button.addEventListener("click", () => { view.windowS = length; drawWindows(); draw(); });
    return button;
  }));
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  storeKey(byId("key").value.trim());
  byId("key").value = "";
  notice("");
  poll();
});
document.addEventListener("visibilitychange", () => { if (!document.hidden && !view.busy && byId("key-form").hidden) poll(); });
addEventListener("resize", draw);
drawLegend();
drawWindows();
poll();
