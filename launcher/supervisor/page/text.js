"use strict";
// Draws what /api/status, /api/curves and /api/samples say (docs/status_server.md), and asks again.
// All texts of the run go through textContent: none of them is markup.

const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}
// Sets a text only where it is another one, so that screen readers are told of changes alone.
function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// ---- Numbers for people ----------------------------------------------------------------------

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

function plain(x, digits = 4) {
  if (!isNumber(x)) return "–";
  if (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e7))
    return x.toExponential(2).replace("e+", "e");
  return String(Number(x.toPrecision(digits)));
}
function short(x) {
  if (!isNumber(x)) return "–";
  for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(x) >= size) return plain(x / size, 3) + letter;
  return plain(x, 3);
}
function bytes(x) {
  if (!isNumber(x)) return "–";
  return x >= 2 ** 30 ? `${plain(x / 2 ** 30, 3)} GiB` : `${Math.round(x / 2 ** 20)} MiB`;
}
function seconds(x) {
  if (!isNumber(x)) return "–";
  return x < 1 ? `${plain(x * 1000, 3)} ms` : `${plain(x, 3)} s`;
}
function duration(x) {
  if (!isNumber(x)) return "–";
  const s = Math.round(x), two = (n) => String(n).padStart(2, "0");
  if (s < 60) return `${s} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${two(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${two(Math.floor(s / 60) % 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor(s / 3600) % 24} h`;
}
const percent = (x) => isNumber(x) ? `${plain(100 * x, x < 0.1 ? 2 : 3)} %` : "–";
const count = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
