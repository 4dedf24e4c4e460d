"use strict";
// What happened over time: a lane for each context, and the pool. Both end at the present.

const WINDOWS = [["30 s", 30], ["1 min", 60], ["5 min", 300]];
const LANE = 21;
const TALL_LANE = 30;
const TIME_STEPS = [5, 10, 20, 30, 60, 120, 300];
const NAME_WIDTH = 46;
const MAX_LANES = 200;

const places = { life: "", rows: new Map(), ends: [] }; // which lane a context got, and until when lanes are taken

/** What the contexts did, in the order they began: [{ id, start, end, spans, decisions }]. */
function livesOf(history, engine) {
  const lives = new Map();
  const add = (span) => {
    if (!lives.has(span.context)) lives.set(span.context, { id: span.context, start: span.start_s, end: 0, spans: [], decisions: [] });
    const life = lives.get(span.context);
    life.start = Math.min(life.start, span.start_s);
    life.end = Math.max(life.end, span.end_s);
    life.spans.push(span);
    return life;
  };
  for (const span of history.spans) add(span);
  for (const context of engine.contexts) {
    const { id, state, tool, state_since_s } = context;
    const life = add({ context: id, state, tool, start_s: state_since_s, end_s: engine.now_s, now: context });
    life.end = Infinity;
  }
  for (const { decision } of history.decisions) {
    lives.get(decision.context_id)?.decisions.push(decision);
  }
  return [...lives.values()].sort((a, b) => a.start - b.start || a.id - b.id);
}

/** Lanes with what they show after `from`. A life keeps its lane; a new one gets the first that is free. */
function lanesOf(lives, engine, from) {
  if (places.life !== engine.life) Object.assign(places, { life: engine.life, rows: new Map(), ends: [] });
  const shown = new Set(lives.map((life) => life.id));
  for (const id of places.rows.keys()) if (!shown.has(id)) places.rows.delete(id);
  const ends = [];
  for (const life of lives) {
    const row = places.rows.get(life.id);
    if (row !== undefined) ends[row] = Math.max(ends[row] ?? -Infinity, life.end);
  }
  for (const life of lives) {
    if (places.rows.has(life.id)) continue;
    let row = 0;
    while ((ends[row] ?? -Infinity) > life.start) row += 1;
    places.rows.set(life.id, row);
    ends[row] = life.end;
  }
  const lanes = [];
  for (const life of lives) {
    if (life.end > from) (lanes[places.rows.get(life.id)] ||= []).push(life);
  }
  return Object.values(lanes).slice(0, MAX_LANES);
}

function spanTip(span) {
  const lines = [`#${span.context} ${span.state}` + (span.tool ? `, waiting for ${span.tool}` : "")];
  const context = span.now;
  lines.push((context ? "for " : "took ") + seconds(span.end_s - span.start_s));
  if (context) {
    lines.push(`${plain.format(context.num_tokens)} tokens, ${plain.format(context.held_tokens)} on the device`);
    if (context.expected_remaining_s !== null) lines.push(`expected back in ${seconds(context.expected_remaining_s)}`);
  }
  return lines.join("\n");
}

function decisionTip(decision) {
  return `${decision.action} ${plain.format(decision.affected_tokens)} tokens of #${decision.context_id}\n${decision.reason}`;
}

function drawLanes(history, engine, windowS) {
  const canvas = byId("lanes");
  const box = canvas.parentNode;
  const width = Math.max(240, box.clientWidth);
  const from = engine.now_s - windowS;
  const lives = livesOf(history, engine);
  const lanes = lanesOf(lives, engine, from);
  const tall = Math.max(LANE, Math.min(TALL_LANE, Math.floor((box.clientHeight - 1) / Math.max(1, lanes.length))));
  const height = Math.max(box.clientHeight - 1, lanes.length * tall);
  const room = width - NAME_WIDTH;
  const at = (moment) => NAME_WIDTH + Math.max(0, Math.min(1, (moment - from) / windowS)) * room;
  const marks = timeMarks(at, engine.now_s, windowS, width);
  const parts = marks.map(({ x }) => svg("line", { class: "rule", x1: x, x2: x, y1: 0, y2: height }));
  lanes.forEach((lane, row) => {
    const y = row * tall;
    const last = lane.at(-1);
    parts.push(svg("rect", { class: "track", x: NAME_WIDTH, y: y + 2.5, width: room, height: tall - 6, rx: 3 }));
    const name = last && last.end === Infinity ? "name" : "name over";
    if (last) parts.push(svg("text", { class: name, x: NAME_WIDTH - 7, y: y + tall / 2 + 3.5, "text-anchor": "end" }, `#${last.id}`));
    for (const life of lane) {
      for (const span of life.spans) if (span.end_s > from) parts.push(...spanMarks(span, at, y, tall));
      for (const decision of life.decisions) if (decision.now > from) parts.push(decisionMark(decision, at(decision.now), y));
    }
  });
  paint(canvas, width, height, parts);
  paint(byId("lanes-axis"), width, 16, marks.map(({ x, anchor, text }) => svg("text", { class: "axis", x, y: 12, "text-anchor": anchor }, text)));
  const hidden = engine.num_contexts - engine.contexts.length;
  const states = new Map();
  for (const context of engine.contexts) states.set(context.state, (states.get(context.state) || 0) + 1);
  const told = [...states].map(([state, number]) => `${number} ${state}`).join(", ");
  byId("lanes-sub").textContent = told + (hidden > 0 ? `, and ${hidden} more` : "");
  return lives.length;
}

/** Where the time axis has its marks, and what they say. */
function timeMarks(at, now, windowS, width) {
  const wanted = Math.max(2, Math.min(6, width / 110));
  const step = TIME_STEPS.find((length) => windowS / length <= wanted) || windowS;
  return Array.from({ length: Math.floor(windowS / step) + 1 }, (_, i) => i * step).map((ago) => ({
    x: Math.round(at(now - ago)) - 0.5,
    anchor: ago === 0 ? "end" : ago === windowS ? "start" : "middle",
    text: ago === 0 ? "now" : windowS < 120 ? `-${ago} s` : `-${ago / 60} min`,
  }));
}

function* spanMarks(span, at, y, tall) {
  const x = at(span.start_s);
  const wide = at(span.end_s) - x;
  if (wide < 0.4) return;
  const slim = span.state === "idle";
  const bar = svg("rect", {
    class: `block s-${span.state}`, x: x.toFixed(1), y: slim ? y + tall / 2 - 2.5 : y + 2.5, width: Math.max(1, wide - 0.6).toFixed(1),
    height: slim ? 4 : tall - 6, rx: slim ? 2 : Math.min(3, wide / 3).toFixed(1),
  });
  yield explain(bar, () => spanTip(span));
  const text = span.tool ? fitted(span.tool, wide - 9) : "";
  if (!text) return;
  const bare = span.state === "discarded" || span.state === "swapped" ? " bare" : "";
  yield svg("text", { class: "on" + bare, x: (x + 5).toFixed(1), y: y + tall / 2 + 3.5 }, text);
}

function decisionMark(decision, x, y) {
  const mark = svg("path", {
    class: `moment m-${decision.action}`, d: `M${x.toFixed(1)} ${y + 16.5}l4.2 -6h-8.4z`, transform: `rotate(180 ${x.toFixed(1)} ${y + 8})`,
  });
  return explain(mark, () => decisionTip(decision));
}

// -- the pool -------------------------------------------------------------------------------------------------

const AREAS = [["running", "running_pages"], ["preserved", "paused_pages"], ["cached", "cached_pages"]];

function drawPool(history, engine, windowS) {
  const canvas = byId("pool");
  const width = Math.max(200, canvas.parentNode.clientWidth);
  const height = Math.max(80, canvas.parentNode.clientHeight);
  const from = engine.now_s - windowS;
  const bottom = height - 17;
  const left = 36;
  const room = width - left - 2;
  const at = (moment) => left + Math.max(0, Math.min(1, (moment - from) / windowS)) * room;
  const total = Math.max(1, engine.device_pages);
  const level = (pages) => bottom - (pages / total) * (bottom - 4);
  const before = history.samples.findLast((sample) => sample.at_s <= from);
  const samples = [...(before ? [before] : []), ...history.samples.filter((sample) => sample.at_s > from)];
  samples.push({ ...engine.pool, at_s: engine.now_s });
  const parts = [svg("rect", { class: "track", x: left, y: 4, width: room, height: bottom - 4 })];
  const floor = samples.map(() => 0);
  for (const [name, key] of AREAS) {
    const low = [...floor];
    samples.forEach((sample, i) => { floor[i] += sample[key]; });
    parts.push(svg("path", { class: `area-${name}`, d: steps(samples, floor, at, level) + steps(samples, low, at, level, true) + "Z" }));
  }
  for (const { x, anchor, text } of timeMarks(at, engine.now_s, windowS, width)) {
    parts.push(svg("line", { class: "rule", x1: x, x2: x, y1: 4, y2: bottom }));
    parts.push(svg("text", { class: "axis", x, y: bottom + 13, "text-anchor": anchor }, text));
  }
  for (const share of [0, 0.5, 1]) {
    const y = Math.round(level(share * total)) + 0.5;
    parts.push(svg("line", { class: "rule", x1: left, x2: width, y1: y, y2: y }));
    parts.push(svg("text", { class: "axis", x: left - 5, y: y + 4, "text-anchor": "end" }, `${share * 100}%`));
  }
  if (engine.host_pages) {
    const host = samples.map((sample) => (sample.host_used_pages / engine.host_pages) * total);
    parts.push(svg("path", { class: "host", d: steps(samples, host, at, level) }));
  }
  paint(canvas, width, height, parts);
  const pool = engine.pool;
  const held = Math.round((100 * (total - pool.free_pages)) / total);
  const hostText = engine.host_pages ? `, dashed: host ${Math.round((100 * pool.host_used_pages) / engine.host_pages)}%` : "";
  byId("pool-sub").textContent = `${count(total * engine.page_size)} tokens, ${held}% filled${hostText}`;
  explain(canvas, () => `${pool.running_pages} pages running, ${pool.paused_pages} preserved, ${pool.cached_pages} cached, ` +
    `${pool.free_pages} free\nhost: ${pool.host_used_pages} of ${engine.host_pages} pages`);
}

/** A stepped line: each value holds until the next. Backwards for an area's lower edge. */
function steps(samples, values, at, level, back = false) {
  const points = [];
  samples.forEach((sample, i) => {
    const x = at(sample.at_s).toFixed(1);
    if (i) points.push([x, level(values[i - 1]).toFixed(1)]);
    points.push([x, level(values[i]).toFixed(1)]);
  });
  if (back) points.reverse();
  return points.map(([x, y], i) => `${i || back ? "L" : "M"}${x} ${y}`).join("");
}
