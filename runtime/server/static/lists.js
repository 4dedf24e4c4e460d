"use strict";
// What is told in words: the figures on top, the decisions, the tools, and what to do on a server that has done nothing.

const SHOWN_DECISIONS = 40;
const RATE_WINDOW_S = 10;

/** Tokens computed a second, and the share of them computed again, over the last seconds. */
function throughput(history, engine) {
  const from = engine.now_s - RATE_WINDOW_S;
  const first = history.samples.find((sample) => sample.at_s >= from) || engine.pool;
  const span = Math.max(0, engine.now_s - first.at_s);
  if (span < 0.2) return { rate: 0, again: 0 };
  const done = engine.pool.tokens_computed - first.tokens_computed;
  const again = engine.pool.tokens_recomputed - first.tokens_recomputed;
  return { rate: done / span, again: done ? again / done : 0 };
}

function tile(value, unit, label, state = "") {
  const name = el("span", {}, label);
  if (state) name.prepend(el("i", { class: `b-${state}` }));
  return el("div", { class: "tile" }, el("b", {}, value, ...(unit ? [el("small", {}, unit)] : [])), name);
}

function drawTiles(history, engine) {
  const { rate } = throughput(history, engine);
  const account = engine.account;
  const [swapped, unit] = bytes((account.pages_out + account.pages_in) * engine.page_bytes);
  const again = account.tokens_computed ? (100 * account.tokens_recomputed) / account.tokens_computed : 0;
  byId("tiles").replaceChildren(
    tile(count(engine.pool.running), "", "running", "running"),
    tile(count(engine.pool.queued), "", "queued", "queued"),
    tile(count(engine.pool.paused), "", "paused", "preserved"),
    tile(count(Math.round(rate)), "tok/s", "throughput"),
    tile(count(account.tokens_computed), "", "computed"),
    tile(again.toFixed(again < 10 ? 1 : 0), "%", "recomputed"),
    tile(swapped, unit, "copied"),
    tile(count(Math.round(account.waste_token_s)), "tok·s", "waste"),
  );
}

function drawHeader(server, engine) {
  byId("fact-model").textContent = server.model;
  byId("fact-policy").textContent = engine.policy;
  byId("fact-uptime").textContent = seconds(server.uptime_s);
  document.title = `${engine.pool.running} running · Caesura`;
}

function costBar(name, value, most, taken) {
  const share = value === null || !Number.isFinite(value) ? 1 : most > 0 ? Math.log1p(value) / Math.log1p(most) : 0;
  return el("div", { class: taken ? "cost taken" : "cost" }, `${name} ${cost(value)}`, svg(
    "svg", { viewBox: "0 0 100 4", preserveAspectRatio: "none" },
    svg("rect", { class: "bar-ground", width: 100, height: 4 }),
    svg("rect", { class: "bar", width: Math.max(share * 100, 0.5).toFixed(1), height: 4 }),
  ));
}

function decisionItem(decision, now) {
  const costs = decision.costs;
  const values = [["preserve", costs.preserve_token_s], ["swap", costs.swap_token_s], ["discard", costs.discard_token_s]];
  const most = Math.max(...values.map(([, value]) => (value === null ? 0 : value)));
  return el("li", {},
    el("div", { class: "what" },
      el("span", { class: `chip c-${decision.action}` }, decision.action),
      el("span", { class: "tool" }, decision.tool || "idle"),
      el("span", { class: "who", title: "tokens affected, of the context's tokens" }, `#${decision.context_id}: ${count(decision.affected_tokens)} of ${count(decision.context_tokens)}`),
      el("span", { class: "when" }, `${seconds(Math.max(0, now - decision.now))} ago`)),
    el("div", { class: "costs" }, ...values.map(([name, value]) => costBar(name, value, most, name === decision.action))),
    el("p", { class: "why" }, decision.reason));
}

function drawDecisions(history, engine) {
  const latest = history.decisions.slice(-SHOWN_DECISIONS).reverse();
  byId("decisions").replaceChildren(...(latest.length
    ? latest.map(({ decision }) => decisionItem(decision, engine.now_s))
    : [el("li", { class: "none" }, "None yet. Nothing is decided until memory is wanted: holding what nobody needs costs nothing.")]));
}

function drawTools(engine) {
  const rows = engine.tools.map((tool) => {
    const name = el("td", {}, tool.tool);
    name.title = tool.tool;
    return el("tr", {}, name, el("td", {}, tool.waiting ? String(tool.waiting) : ""), el("td", {}, count(tool.calls)),
      el("td", {}, tool.calls ? seconds(tool.median_s) : ""), el("td", {}, tool.calls ? seconds(tool.longest_s) : ""));
  });
  byId("tools").replaceChildren(...(rows.length
    ? rows : [el("tr", {}, el("td", { colspan: "5", class: "none" }, "No context has waited for a tool yet."))]));
}

function drawEmpty(empty, needsKey) {
  const card = byId("lanes-empty");
  card.hidden = !empty;
  if (!empty || card.childElementCount) return;
  const key = needsKey ? ' -H "authorization: Bearer $KEY"' : "";
  const ask = `curl ${location.origin}/v1/chat/completions${key} -H 'content-type: application/json' \\\n` +
    `  -d '{"messages": [{"role": "user", "content": "What is 4827 * 396?"}]}'`;
  card.replaceChildren(
    el("strong", {}, "Nothing has run yet"),
    el("p", {}, "Point any OpenAI client at ", el("code", {}, `${location.origin}/v1`), ", or try one of these:"),
    el("pre", {}, el("code", {}, ask)),
    el("pre", {}, el("code", {}, `python examples/agents_over_http.py --url ${location.origin}${needsKey ? " --key $KEY" : ""}`)));
}
