"use strict";
// The radix tree as an icicle lying on its side: tokens from left to right, and one band for each leaf.

const LEGEND = [
  ["running", "running"], ["preserved", "preserved"], ["swapped", "on the host"], ["discarded", "discarded"],
  ["cached", "cached"],
];
const MAX_BAND = 30;
const AXIS_HEIGHT = 17;

/** Parents' children, "null" for the roots'; siblings keep their places from one picture to the next. */
function branches(nodes) {
  const below = new Map();
  for (const node of nodes) {
    const key = String(node.parent);
    if (!below.has(key)) below.set(key, []);
    below.get(key).push(node);
  }
  const age = new Map();
  const oldest = (node) => {
    if (!age.has(node)) {
      const children = node.id >= 0 ? below.get(String(node.id)) || [] : [];
      const own = node.kind === "run" ? node.id : node.kind === "rest" ? 1e12 : 1e9 + (node.holders[0] || 0);
      age.set(node, children.reduce((least, child) => Math.min(least, oldest(child)), own));
    }
    return age.get(node);
  };
  for (const group of below.values()) group.sort((a, b) => oldest(a) - oldest(b));
  return below;
}

/** Where one context alone holds a stretch of the tree: whose it is, for the widest run of it. */
function owners(placed, below) {
  const found = new Map();
  const ownerOf = (node) => {
    if (node.holders.length === 1) return node.holders[0];
    for (const child of node.id >= 0 ? below.get(String(node.id)) || [] : []) {
      if (child.num_holders === 1) return ownerOf(child);
    }
    return null;
  };
  const widest = new Map();
  for (const { node } of placed) {
    const owner = node.num_holders === 1 ? ownerOf(node) : null;
    if (owner !== null && node.num_tokens > (widest.get(owner)?.num_tokens ?? 0)) widest.set(owner, node);
  }
  for (const [owner, node] of widest) found.set(node, owner);
  return found;
}

/** Bands for every node: `top` and `size` in units of one leaf. */
function layOut(nodes) {
  const below = branches(nodes);
  const placed = [];
  const place = (node, top) => {
    const children = node.id >= 0 ? below.get(String(node.id)) || [] : [];
    const spot = { node, top, size: 0 };
    placed.push(spot);
    for (const child of children) spot.size += place(child, top + spot.size);
    if (!children.length) spot.size = node.kind === "rest" ? 1 + Math.log2(1 + node.count) : 1;
    return spot.size;
  };
  let size = 0;
  for (const root of below.get("null") || []) size += place(root, size);
  return { placed, size, owned: owners(placed, below) };
}

function nodeLabel(node, owned, tools) {
  if (node.kind === "rest") return `${count(node.count)} more`;
  if (node.num_holders > 1) return `${node.num_holders} contexts`;
  if (!node.num_holders) return `${count(node.num_tokens)} tokens`;
  if (!owned.has(node)) return "";
  const tool = tools.get(owned.get(node));
  return `#${owned.get(node)}` + (tool ? ` ${tool}` : "");
}

function nodeTip(node, engine) {
  const kinds = {
    run: "a run of whole pages", tail: "pages being filled", gone: "to be computed again", rest: `${node.count} runs, summed up`,
  };
  const lines = [
    `${node.state}${node.copying ? ", being copied" : ""}: ${kinds[node.kind]}`,
    `tokens ${plain.format(node.start)} to ${plain.format(node.start + node.num_tokens)}`,
    `pages: ${node.device_pages} on the device, ${node.host_pages} on the host`,
  ];
  if (node.num_holders) {
    const more = node.num_holders > node.holders.length && node.holders.length ? " and others" : "";
    const names = node.holders.map((id) => `#${id}`).join(" ");
    lines.push(`held by ${node.num_holders}` + (names ? `: ${names}${more}` : ""));
  }
  if (node.last_used_step) lines.push(`last used ${count(Math.max(0, engine.step - node.last_used_step))} steps ago`);
  return lines.join("\n");
}

function drawTree(engine) {
  const canvas = byId("tree");
  const width = Math.max(200, canvas.parentNode.clientWidth);
  const height = Math.max(120, canvas.parentNode.clientHeight);
  const { placed, size, owned } = layOut(engine.nodes);
  const tools = new Map(engine.contexts.map((context) => [context.id, context.tool]));
  const end = Math.max(1, ...engine.nodes.map((node) => node.start + node.num_tokens));
  const band = Math.min(MAX_BAND, (height - AXIS_HEIGHT) / Math.max(1, size));
  const bottom = band * size;
  const scale = (width - 2) / end;
  const gap = band >= 5 ? 1 : 0;
  const parts = [];
  for (const tick of placed.length ? ticks(end, width / 110) : []) {
    const x = Math.round(1 + tick * scale) + 0.5;
    parts.push(svg("line", { class: "rule", x1: x, x2: x, y1: 0, y2: bottom + 4 }));
    const anchor = tick === 0 ? "start" : x > width - 40 ? "end" : "middle";
    const text = count(tick) + (tick === 0 ? " tokens" : "");
    parts.push(svg("text", { class: "axis", x, y: bottom + 15, "text-anchor": anchor }, text));
  }
  for (const { node, top, size: bands } of placed) {
    const x = 1 + node.start * scale;
    const wide = Math.max(1, node.num_tokens * scale - gap);
    const tall = Math.max(0.7, bands * band - gap);
    const y = top * band;
    const block = svg("rect", {
      class: `block s-${node.state}`, x: x.toFixed(2), y: y.toFixed(2), width: wide.toFixed(2), height: tall.toFixed(2),
      rx: Math.min(3, tall / 4, wide / 4).toFixed(1),
    });
    parts.push(explain(block, () => nodeTip(node, engine)));
    const label = tall >= 12 ? fitted(nodeLabel(node, owned, tools), wide - 8) : "";
    if (label) {
      const bare = node.state === "discarded" || node.state === "swapped" ? " bare" : "";
      parts.push(svg("text", { class: "on" + bare, x: (x + 5).toFixed(1), y: (y + Math.min(tall / 2, 60) + 4).toFixed(1) }, label));
    }
  }
  paint(canvas, width, height, parts);
  const told = engine.num_nodes === 1 ? "1 node" : `${count(engine.num_nodes)} nodes`;
  byId("tree-sub").textContent = engine.num_nodes ? told : "empty: nothing is cached yet";
}

function drawLegend() {
  byId("legend").replaceChildren(...LEGEND.map(([state, text]) => el(
    "li", {}, svg("svg", { viewBox: "0 0 14 11" }, svg("rect", {
      class: `block s-${state}`, x: 0.5, y: 0.5, width: 13, height: 10, rx: 2,
    })), text,
  )));
}
