"use strict";
// What a refinement keeps, drops and adds, by words.

const MOST_EDITS = 1500; // beyond, two texts count as different altogether

function wordsOf(text) {
  return text.match(/\s+|[\p{L}\p{N}_]+|[^\s\p{L}\p{N}_]/gu) || [];
}

/** The edits of Myers' shortest script from a to b: [kind, word] with " ", "-" or "+"; null beyond `MOST_EDITS`. */
function script(a, b) {
  const most = Math.min(a.length + b.length, MOST_EDITS);
  const reach = new Int32Array(2 * most + 2);
  const trace = [];
  for (let edits = 0; edits <= most; edits++) {
    trace.push(reach.slice(most - edits, most + edits + 2));
    for (let k = -edits; k <= edits; k += 2) {
      const down = k === -edits || (k !== edits && reach[most + k - 1] < reach[most + k + 1]);
      let x = down ? reach[most + k + 1] : reach[most + k - 1] + 1;
      while (x < a.length && x - k < b.length && a[x] === b[x - k]) x++;
      reach[most + k] = x;
      if (x >= a.length && x - k >= b.length) return walkedBack(a, b, trace);
    }
  }
  return null;
}

function walkedBack(a, b, trace) {
  const found = [];
  let [x, y] = [a.length, b.length];
  for (let edits = trace.length - 1; edits >= 0; edits--) {
    const reach = (k) => trace[edits][k + edits];
    const k = x - y;
    const down = k === -edits || (k !== edits && reach(k - 1) < reach(k + 1));
    const before = down ? k + 1 : k - 1;
    const [fromX, fromY] = edits ? [reach(before), reach(before) - before] : [0, 0];
    for (; x > fromX && y > fromY; x--, y--) found.push([" ", a[x - 1]]);
    if (edits) found.push(down ? ["+", b[fromY]] : ["-", a[fromX]]);
    [x, y] = [fromX, fromY];
  }
  return found.reverse();
}

/** [kind, text] pieces from one text to another: what both have " ", what is dropped "-", what is added "+". */
function difference(before, after) {
  const [a, b] = [wordsOf(before), wordsOf(after)];
  let start = 0;
  while (start < a.length && start < b.length && a[start] === b[start]) start++;
  let end = 0;
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
  const [middleA, middleB] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
  const edits = script(middleA, middleB) || [["-", middleA.join("")], ["+", middleB.join("")]];
  const pieces = [];
  for (const [kind, text] of [[" ", a.slice(0, start).join("")], ...edits, [" ", a.slice(a.length - end).join("")]]) {
    const last = pieces[pieces.length - 1];
    if (last && last[0] === kind) last[1] += text;
    else if (text) pieces.push([kind, text]);
  }
  return pieces;
}

function differenceText(before, after) {
  const tags = { " ": "span", "-": "del", "+": "ins" };
  const nodes = difference(before, after).map(([kind, text]) => el(tags[kind], {}, text));
  return el("div", { class: "text" }, ...nodes);
}
