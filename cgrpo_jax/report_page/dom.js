"use strict";
// Elements, numbers and colours. Texts reach the page as text nodes only: nothing of a model is ever markup.

/** An element with attributes and children; strings become text. `on` holds handlers. Names come from this code alone. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) node.addEventListener(event, handler);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function byId(id) {
  return document.getElementById(id);
}

const NONE = "–";

/** A number as people read it: four significant digits, thousands apart. */
function number(value, digits = 4) {
  if (typeof value !== "number") return NONE;
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return Number(value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 6 });
}

/** A signed number of two decimals, with a true minus. */
function signed(value) {
  if (typeof value !== "number") return NONE;
  return (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
}

function share(value) {
  return typeof value === "number" ? value.toFixed(3) : NONE;
}

function plural(count, one, many = one + "s") {
  return `${count.toLocaleString("en")} ${count === 1 ? one : many}`;
}

/** A colour of the style sheet, as it is now: light or dark. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

const HUES = 6;

function hue(index) {
  return colour(`hue${index % HUES}`);
}

/** A small square in the colour of a run or of a curve. */
function swatch(index, dash = 0) {
  return el("span", { class: `swatch hue${index % HUES} dash${dash % 4}`, "aria-hidden": "true" });
}

/** A table of texts: the first column heads its rows. */
function textTable(columns, rows, attributes = {}) {
  const head = el("tr", {}, ...columns.map((name) => el("th", { scope: "col" }, name)));
  const body = rows.map((row) =>
    el("tr", {}, ...row.map((cell, index) => (index ? el("td", {}, cell) : el("th", { scope: "row" }, cell)))),
  );
  const table = el("table", attributes, el("thead", {}, head), el("tbody", {}, ...body));
  return el("div", { class: "scroll", tabindex: "0" }, table);
}
