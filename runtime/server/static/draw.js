"use strict";
// Small helpers. All text goes in by textContent; nothing here parses markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, String(value));
  for (const child of children) node.append(child);
  return node;
}

/** An HTML element; strings among its children become text. */
function el(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element. */
function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Give a picture its size and its parts. */
function paint(canvas, width, height, parts) {
  fill(canvas, { width, height, viewBox: `0 0 ${width} ${height}` }, []);
  canvas.replaceChildren(...parts);
}

function byId(id) {
  return document.getElementById(id);
}

/** Text that fits a width in pixels, cut with an ellipsis; "" when hardly anything fits. */
function fitted(text, width, perChar = 6.3) {
  const room = Math.floor(width / perChar);
  if (text.length <= room) return text;
  return room < 3 ? "" : text.slice(0, room - 1) + "…";
}

const plain = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

function count(value) {
  if (value >= 1e7) return (value / 1e6).toFixed(0) + "M";
  if (value >= 1e5) return (value / 1e3).toFixed(0) + "k";
  return plain.format(value);
}

/** A cost: three digits are enough to compare. */
function cost(value) {
  if (value === null || !Number.isFinite(value)) return "∞";
  if (value >= 10) return count(Math.round(value));
  return value >= 0.1 ? value.toFixed(1) : value === 0 ? "0" : value.toFixed(3);
}

function bytes(value) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) {
    if (value >= size) return [(value / size).toFixed(value >= 10 * size ? 0 : 1), unit];
  }
  return [String(value), "B"];
}

function seconds(value) {
  if (value === null || !Number.isFinite(value)) return "?";
  if (value < 0.0995) return Math.round(value * 1000) + " ms";
  if (value < 9.95) return value.toFixed(1) + " s";
  if (value < 120) return Math.round(value) + " s";
  if (value < 7200) return Math.round(value / 60) + " min";
  if (value < 172800) return Math.round(value / 3600) + " h";
  return Math.round(value / 86400) + " d";
}

/** Round whole numbers between 0 and `end`, about `wanted` of them. */
function ticks(end, wanted) {
  if (!(end > 0)) return [0];
  const rough = end / Math.max(1, wanted);
  const power = Math.max(1, 10 ** Math.floor(Math.log10(rough)));
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough) || 10);
  const found = [];
  for (let value = 0; value <= end; value += step) found.push(value);
  return found;
}

// -- the tip that follows the pointer -------------------------------------------------------------------------

const tips = new WeakMap();

/** What to say when the pointer is on `node`: a function, asked when it is needed. */
function explain(node, text) {
  tips.set(node, text);
  return node;
}

function showTip(event) {
  const tip = byId("tip");
  let node = event.target;
  while (node && !tips.has(node)) node = node.parentNode;
  tip.hidden = !node;
  if (!node) return;
  tip.textContent = tips.get(node)();
  const box = tip.getBoundingClientRect();
  const x = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 18;
  tip.style.left = Math.max(8, x) + "px";
  tip.style.top = (below + box.height > innerHeight - 8 ? event.clientY - box.height - 12 : below) + "px";
}

document.addEventListener("pointermove", showTip);
document.addEventListener("pointerdown", showTip);
document.addEventListener("pointerleave", () => { byId("tip").hidden = true; });
