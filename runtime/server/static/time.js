"use strict";
// What happened over time: a lane for each context, and the pool. Both end at the present.

const WINDOWS = [["30 s", 30], ["1 min", 60], ["5 min", 300]];
const LANE = 21;
const LANES_TOP = 2;
const NAME_WIDTH = 46;
const MAX_LANES = 200;

/** Lanes of the contexts that did something in the window, the newest context first. */
function lanesOf(history, engine, from) {
  const lanes = new Map();
  const lane = (id) => {
    if (!lanes.has(id)) lanes.set(id, { id, spans: [], decisions: [], open: false });
    return lanes.get(id);
  };
  for (const span of history.spans) if (span.end_s > from) lane(span.context).spans.push(span);
  for (const context of engine.contexts) {
    const mine = lane(context.id);
    mine.open = true;
    mine.spans.push({
      context: context.id, state: context.state, tool: context.tool, start_s: context.state_since_s, end_s: engine.now_s,
      open: true, context_now: context,
    });
  }
  for (const { decision } of history.decisions) {
    if (decision.now > from && lanes.has(decision.context_id)) lanes.get(decision.context_id).decisions.push(decision);
  }
  return [...lanes.values()].sort((a, b) => b.id - a.id).slice(0, MAX_LANES);
}

function spanTip(span) {
  const lines = [`#${span.context} ${span.state}` + (span.tool ? `, waiting for ${span.tool}` : "")];
  lines.push((span.open ? "for " : "took ") + seconds(span.end_s - span.start_s));
  const context = span.context_now;
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
  const width = Math.max(240, box.clientWidth - 2);
  const from = engine.now_s - windowS;
  const lanes = lanesOf(history, engine, from);
  const height = Math.max(box.clientHeight - 2, LANES_TOP + lanes.length * LANE + 20);
  const foot = Math.max(LANES_TOP + lanes.length * LANE, box.clientHeight - 22);
  const room = width - NAME_WIDTH - 6;
  const at = (moment) => NAME_WIDTH + Math.max(0, Math.min(1, (moment - from) / windowS)) * room;
  const parts = [...timeRules(at, engine.now_s, windowS, foot, width)];
  lanes.forEach((lane, row) => {
    const y = LANES_TOP + row * LANE;
    parts.push(svg("rect", { class: "track", x: NAME_WIDTH, y: y + 2, width: room, height: LANE - 5, rx: 3 }));
    parts.push(svg("text", { class: lane.open ? "name" : "name over", x: NAME_WIDTH - 7, y: y + 14, "text-anchor": "end" }, `#${lane.id}`));
    for (const span of lane.spans) parts.push(...spanMarks(span, at, y));
    for (const decision of lane.decisions) parts.push(decisionMark(decision, at(decision.now), y));
  });
  fill(canvas, { width, height, viewBox: `0 0 ${width} ${height}` }, []);
  canvas.replaceChildren(...parts);
  const hidden = engine.num_contexts - engine.contexts.length;
  const states = new Map();
  for (const context of engine.contexts) states.set(context.state, (states.get(context.state) || 0) + 1);
  const told = [...states].map(([state, number]) => `${number} ${state}`).join(", ");
  byId("lanes-sub").textContent = told + (hidden > 0 ? `, and ${hidden} more contexts` : "");
  return lanes.length;
}

function* timeRules(at, now, windowS, bottom, width) {
  for (const ago of ticks(windowS, Math.max(2, Math.min(6, width / 130)))) {
    const x = Math.round(at(now - ago)) + 0.5;
    yield svg("line", { class: "rule", x1: x, x2: x, y1: 0, y2: bottom });
    const anchor = ago === 0 ? "end" : ago === windowS ? "start" : "middle";
    yield svg("text", { class: "axis", x, y: bottom + 14, "text-anchor": anchor }, ago === 0 ? "now" : `-${seconds(ago)}`);
  }
}

function* spanMarks(span, at, y) {
  const x = at(span.start_s);
  const wide = at(span.end_s) - x;
  if (wide < 0.4) return;
  const slim = span.state === "idle";
  const bar = svg("rect", {
    class: `block s-${span.state}`, x: x.toFixed(1), y: slim ? y + 8 : y + 2.5, width: Math.max(1, wide - 0.6).toFixed(1),
    height: slim ? 4 : LANE - 6, rx: slim ? 2 : Math.min(3, wide / 3).toFixed(1),
  });
  yield explain(bar, () => spanTip(span));
  const text = span.tool ? fitted(span.tool, wide - 9) : "";
  if (!text) return;
  const bare = span.state === "discarded" || span.state === "swapped" ? " bare" : "";
  yield svg("text", { class: "on" + bare, x: (x + 5).toFixed(1), y: y + 14 }, text);
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
  const left = 30;
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
  parts.push(...timeRules(at, engine.now_s, windowS, bottom, width));
  for (const share of [0, 0.5, 1]) {
    const y = Math.round(level(share * total)) + 0.5;
    parts.push(svg("line", { class: "rule", x1: left, x2: width, y1: y, y2: y }));
    parts.push(svg("text", { class: "axis", x: left - 5, y: y + 4, "text-anchor": "end" }, `${share * 100}%`));
  }
  if (engine.host_pages) {
    const host = samples.map((sample) => (sample.host_used_pages / engine.host_pages) * total);
    parts.push(svg("path", { class: "host", d: steps(samples, host, at, level) }));
  }
  fill(canvas, { width, height, viewBox: `0 0 ${width} ${height}` }, []);
  canvas.replaceChildren(...parts);
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
