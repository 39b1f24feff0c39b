"use strict";
// Texts of models: maths, marks of a search, shades of probability.

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"; // as in workdir/shades.py
const LEVELS_A_NAT = 8;
const LONGEST_FORMULA = 2000; // characters; what is longer is shown as it was written
const FORMULAS = 400; // of a text

/** The end of a group that opens with the brace at `open`: the place behind its closing brace, or -1. */
function closing(text, open) {
  let depth = 0;
  for (let at = open; at < text.length && at < open + LONGEST_FORMULA; at++) {
    if (text[at] === "\\") at++;
    else if (text[at] === "{") depth++;
    else if (text[at] === "}" && --depth === 0) return at + 1;
  }
  return -1;
}

const OPENERS = /\\\[|\\\(|\$\$|\$|\\boxed\{|\\begin\{(equation|align|aligned|gather|cases|matrix|pmatrix|bmatrix|array)\*?\}/g;

/** {end, formula, display} of the formula that a match opens, or null. */
function formulaAt(text, match) {
  const [opener, from] = [match[0], match.index + match[0].length];
  if (opener === "\\boxed{") {
    const end = closing(text, from - 1);
    return end < 0 ? null : { end, formula: text.slice(match.index, end), display: false };
  }
  if (opener.startsWith("\\begin")) {
    const closer = opener.replace("begin", "end");
    const at = text.indexOf(closer, from);
    if (at < 0) return null;
    return { end: at + closer.length, formula: text.slice(match.index, at + closer.length), display: true };
  }
  const closer = { "\\[": "\\]", "\\(": "\\)", $$: "$$", $: "$" }[opener];
  const at = text.indexOf(closer, from);
  if (at < 0 || at === from) return null;
  const formula = text.slice(from, at);
  if (opener === "$") {
    // as pandoc has it: no space inside, no digit behind, no empty line; so "$5 and $6" is money
    if (/^\s|\s$|\n\s*\n/.test(formula) || /\d/.test(text[at + 1] || "")) return null;
  }
  return { end: at + closer.length, formula, display: opener === "\\[" || opener === "$$" };
}

/** The text as parts in their order: {text} or {text, formula, display}; together they are the text. */
function partsOf(text) {
  const parts = [];
  let [done, count] = [0, 0];
  OPENERS.lastIndex = 0;
  for (let match = OPENERS.exec(text); match && count < FORMULAS; match = OPENERS.exec(text)) {
    const found = formulaAt(text, match);
    if (!found || found.formula.length > LONGEST_FORMULA) continue;
    if (match.index > done) parts.push({ text: text.slice(done, match.index) });
    parts.push({ text: text.slice(match.index, found.end), formula: found.formula, display: found.display });
    [done, count] = [found.end, count + 1];
    OPENERS.lastIndex = done;
  }
  if (done < text.length) parts.push({ text: text.slice(done) });
  return parts;
}

/** Labels and references of a formula would name and link to elements of the page. */
function withoutLinks(node) {
  for (const inner of node.querySelectorAll("*")) {
    for (const name of ["id", "href", "xlink:href"]) inner.removeAttribute(name);
    if (inner.localName === "a") inner.replaceWith(...inner.childNodes);
  }
}

/** The formula as MathML; what cannot be read stays as it was written. */
function formulaNode(part) {
  const node = el("span", { class: part.display ? "formula display" : "formula" });
  try {
    const options = { displayMode: part.display, trust: false, throwOnError: true, maxSize: [20, 200], maxExpand: 200 };
    temml.render(part.formula, node, options);
    withoutLinks(node);
  } catch {
    node.replaceChildren(part.text);
    node.className = "unread";
  }
  node.title = part.text;
  return node;
}

/** Text with the places marked that hold the query, which is in lower case. */
function marked(text, query) {
  const nodes = [];
  const low = query ? text.toLowerCase() : "";
  let done = 0;
  if (query && low.length === text.length) {
    for (let at = low.indexOf(query); at >= 0; at = low.indexOf(query, done)) {
      if (at > done) nodes.push(text.slice(done, at));
      nodes.push(el("mark", {}, text.slice(at, at + query.length)));
      done = at + query.length;
    }
  }
  if (done < text.length) nodes.push(text.slice(done));
  return nodes;
}

function renderedText(text, query) {
  const nodes = partsOf(text).flatMap((part) => {
    if (part.formula === undefined) return marked(part.text, query);
    const node = formulaNode(part);
    if (query && part.text.toLowerCase().includes(query)) node.classList.add("found");
    return [node];
  });
  return el("div", { class: "text" }, ...nodes);
}

/** [{text, logp}] of an attempt, tokens that share a character as one; null where they are not known. */
function tokensOf(attempt) {
  if (typeof attempt.widths !== "string" || typeof attempt.logp !== "string") return null;
  const characters = Array.from(attempt.text);
  const tokens = [];
  let [at, width, token] = [0, 0, 0];
  for (const letter of attempt.widths) {
    width += LETTERS.indexOf(letter);
    if (letter === "_") continue;
    const logp = -LETTERS.indexOf(attempt.logp[token]) / LEVELS_A_NAT;
    if (width === 0 && tokens.length) tokens[tokens.length - 1].logp += logp;
    else tokens.push({ text: characters.slice(at, at + width).join(""), logp });
    [at, width, token] = [at + width, 0, token + 1];
  }
  return at === characters.length ? tokens : null;
}

function probability(logp) {
  const p = Math.exp(logp);
  return p < 0.001 ? "p < 0.001" : `p ≈ ${p.toFixed(p < 0.1 ? 3 : 2)}`;
}

/** How dark a token is, 0 to 7: a shade a nat. */
function shadeOf(logp) {
  return Math.min(7, Math.round(-logp));
}

function shadedText(attempt) {
  const tokens = tokensOf(attempt);
  if (!tokens) {
    const why = el("p", { class: "said" }, "The probabilities of these tokens are not in the file.");
    return el("div", {}, why, el("div", { class: "text" }, attempt.text));
  }
  const spans = tokens.map((token) => el("span", { class: `shade${shadeOf(token.logp)}`, title: probability(token.logp) }, token.text));
  return el("div", { class: "text tokens" }, ...spans);
}

function shadeLegend() {
  const steps = [1, 0.5, 0.1, 0.01, 0.001].map((p) => el("span", { class: `shade${shadeOf(Math.log(p))}` }, ` p = ${p} `));
  return el("p", { class: "said shades" }, "Probability that the sampler gave each token: ", ...steps);
}
