"use strict";
// The list of problems: filters, search, keys. Only the rows in sight exist, so its length costs nothing.

const STATUS = {
  failed: { label: "Persistently failed", kind: "bad", title: "no response and no refinement is right" },
  fixed: { label: "Fixed by refinement", kind: "fixed", title: "no response is right, a refinement is" },
  solved: { label: "Solved", kind: "good", title: "a response is right" },
};
const ORDERS = {
  newest: { label: "newest step first", by: (a, b) => b.step - a.step || a.number - b.number },
  oldest: { label: "oldest step first", by: (a, b) => a.number - b.number },
  longest: { label: "longest response first", by: (a, b) => b.longest - a.longest || a.number - b.number },
  hardest: { label: "fewest right first", by: (a, b) => a.right - b.right || a.number - b.number },
};
const ROW = 58; // pixels, as in page.css
const list = { items: [], shown: [], at: 0, byQuestion: new Map(), query: "" };

function isRight(attempt) {
  return "correct" in attempt ? attempt.correct : attempt.reward >= 1;
}

function itemOf(group, step, index, run, runName, number) {
  for (const attempt of [...group.responses, ...group.refinements]) attempt.correct = isRight(attempt);
  const right = group.responses.filter((attempt) => attempt.correct).length;
  const fixed = group.refinements.filter((attempt) => attempt.correct).length;
  const longest = Math.max(0, ...group.responses.map((attempt) => attempt.tokens ?? attempt.text.length));
  const status = right ? "solved" : fixed ? "fixed" : "failed";
  return { group, step, index, run, runName, number, status, right: right / (group.responses.length || 1), solved: right, fixed, longest };
}

/** "step 3", or nothing of an evaluation. */
function stepOf(item) {
  return item.step === null ? "" : `step ${item.step}`;
}

/** All texts of a problem in lower case, made when the first search needs them. */
function haystack(item) {
  if (item.haystack === undefined) {
    const { group } = item;
    const texts = [...group.responses, ...group.refinements].flatMap((one) => [one.text, one.critique || "", one.answer || ""]);
    item.haystack = [group.question, group.answer, group.tag || "", ...texts].join("\n").toLowerCase();
  }
  return item.haystack;
}

function readRollouts(data) {
  const several = data.runs.length > 1;
  document.querySelectorAll("script.rollouts").forEach((node, run) => {
    const { steps, said } = JSON.parse(node.textContent);
    node.remove();
    for (const { step, groups } of steps) {
      groups.forEach((group, index) => {
        const item = itemOf(group, step, index, run, several ? data.runs[run].name : "", list.items.length);
        list.items.push(item);
        if (!list.byQuestion.has(group.question)) list.byQuestion.set(group.question, []);
        list.byQuestion.get(group.question).push(item);
      });
    }
    if (said) byId("rollouts-said").append(el("p", { class: "said" }, several ? `${data.runs[run].name}: ${said}` : said));
  });
}

function select(id, label, options) {
  return el("label", { class: "field" }, label, " ", el("select", { id, on: { change: applyFilters } }, ...options.map(([value, text]) => el("option", { value }, text))));
}

function drawFilters(data) {
  const chips = [["all", { label: "All", title: "every problem" }], ...Object.entries(STATUS)].map(([name, { label, title }]) =>
    el("button", { type: "button", class: "chip", "data-status": name, "aria-pressed": "false", title, on: { click: () => setStatus(name) } },
      label, " ", el("span", { class: "count" })));
  const found = (values) => [...new Set(values)];
  const steps = found(list.items.map((item) => item.step)).filter((step) => step !== null).sort((a, b) => a - b);
  const tags = found(list.items.map((item) => item.group.tag || "")).filter(Boolean).sort();
  const all = ["", "all"];
  const orders = Object.entries(ORDERS).map(([name, order]) => [name, order.label]);
  const nodes = [
    ...chips,
    el("input", { type: "search", id: "search", placeholder: "Search all texts", "aria-label": "Search", autocomplete: "off", spellcheck: "false", on: { input: searchSoon } }),
    data.runs.length > 1 ? select("filter-run", "Run", [all, ...data.runs.map((run, index) => [index, run.name])]) : null,
    steps.length ? select("filter-step", "Step", [all, ...steps.map((step) => [step, step])]) : null,
    tags.length > 1 ? select("filter-tag", steps.length ? "Tag" : "Task", [all, ...tags.map((tag) => [tag, tag])]) : null,
    select("filter-order", "Order", steps.length ? orders : [["oldest", "as in the task"], ...orders.slice(2)]),
  ];
  byId("filters").replaceChildren(...nodes.filter(Boolean));
}

let status = "all";

function setStatus(name) {
  status = name;
  applyFilters();
}

let waiting = 0;

function searchSoon() {
  clearTimeout(waiting);
  waiting = setTimeout(applyFilters, 120);
}

function value(id) {
  return byId(id) ? byId(id).value : "";
}

/** Shows what the filters leave; the counts of the chips are under all other filters. */
function applyFilters() {
  const [run, step, tag] = ["filter-run", "filter-step", "filter-tag"].map(value);
  list.query = value("search").trim().toLowerCase();
  const rest = list.items.filter((item) =>
    (run === "" || item.run === Number(run)) && (step === "" || item.step === Number(step)) &&
    (tag === "" || item.group.tag === tag) && (!list.query || haystack(item).includes(list.query)));
  for (const chip of document.querySelectorAll(".chip")) {
    const name = chip.dataset.status;
    const count = name === "all" ? rest.length : rest.filter((item) => item.status === name).length;
    chip.querySelector(".count").textContent = count.toLocaleString("en");
    chip.setAttribute("aria-pressed", String(name === status));
  }
  list.shown = rest.filter((item) => status === "all" || item.status === status).sort(ORDERS[value("filter-order")].by);
  byId("list").scrollTop = 0;
  choose(0);
}

function rowNode(item, at) {
  const { group } = item;
  const refined = group.refinements.length ? ` · refined ${item.fixed}/${group.refinements.length}` : "";
  const place = [item.runName, stepOf(item), group.tag].filter(Boolean).join(" · ");
  const node = el("div", { class: "row", role: "option", id: `row${at}`, "aria-selected": String(at === list.at), "aria-setsize": list.shown.length, "aria-posinset": at + 1, on: { click: () => choose(at) } },
    el("span", { class: `dot ${STATUS[item.status].kind}`, title: STATUS[item.status].label }),
    el("span", { class: "what" }, group.question.slice(0, 160)),
    el("span", { class: "where" }, `${place} · ${item.solved}/${group.responses.length} right${refined}`));
  node.style.top = `${at * ROW}px`;
  return node;
}

/** Makes the rows that are in sight, and a few on both sides. */
function drawRows() {
  const box = byId("list");
  const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 4);
  const behind = Math.min(list.shown.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 4);
  const rows = [];
  for (let at = first; at < behind; at++) rows.push(rowNode(list.shown[at], at));
  const length = el("div", { class: "length" }, ...rows);
  length.style.height = `${list.shown.length * ROW}px`;
  const top = box.scrollTop;
  box.replaceChildren(length);
  if (box.scrollTop !== top) box.scrollTop = top;
  if (list.shown.length) box.setAttribute("aria-activedescendant", `row${list.at}`);
  else box.removeAttribute("aria-activedescendant");
}

function choose(at) {
  list.at = Math.max(0, Math.min(at, list.shown.length - 1));
  const box = byId("list");
  const top = list.at * ROW;
  if (top < box.scrollTop) box.scrollTop = top;
  if (top + ROW > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW - box.clientHeight;
  drawRows();
  const item = list.shown[list.at];
  const others = item ? list.byQuestion.get(item.group.question).filter((other) => other !== item) : [];
  showDetail(item, list.query, others, goTo);
}

/** Shows a problem that the filters may hide. */
function goTo(item) {
  if (!list.shown.includes(item)) {
    for (const id of ["filter-run", "filter-step", "filter-tag", "search"]) if (byId(id)) byId(id).value = "";
    status = "all";
    applyFilters();
  }
  choose(list.shown.indexOf(item));
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const target = event.target;
  const search = byId("search");
  const typing = target.matches("input, textarea");
  if (event.key === "/" && !typing && !target.matches("select")) {
    search.focus();
    search.select();
    byId("rollouts").scrollIntoView();
  } else if (event.key === "Escape" && target === search) {
    search.value = "";
    applyFilters();
    byId("list").focus();
  } else if (target === search && (event.key === "ArrowDown" || event.key === "Enter")) {
    byId("list").focus({ preventScroll: true });
  } else if (event.key === "v" && !typing && (target === document.body || byId("rollouts").contains(target))) {
    nextView(); // also from a filter, which a click has left with the focus
  } else if (!typing && byId("browser").contains(target)) {
    const page = Math.max(1, Math.floor(byId("list").clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    const inList = target === byId("list");
    if (event.key in moves && (inList || event.key.startsWith("Arrow"))) choose(list.at + moves[event.key]);
    else if (event.key === "ArrowRight") moveAttempt(1);
    else if (event.key === "ArrowLeft") moveAttempt(-1);
    else return;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") byId("list").focus({ preventScroll: true });
  } else return;
  event.preventDefault();
}

function drawRollouts(data) {
  readRollouts(data);
  if (!list.items.length) {
    byId("browser").replaceWith(el("p", { class: "empty" }, "These runs left no rollouts."));
    return;
  }
  drawFilters(data);
  byId("list").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  new ResizeObserver(drawRows).observe(byId("list"));
  document.addEventListener("keydown", pressed);
  setStatus(list.items.some((item) => item.status === "failed") ? "failed" : "all");
}
