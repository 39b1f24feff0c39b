"use strict";
// One problem: question, responses, critiques, refinements.

const VIEWS = { rendered: "Rendered", source: "As written", tokens: "Token probabilities", difference: "Difference" };
let view = "rendered";
let present = null; // what is shown: {item, query, cards}

function pill(text, kind, title = null) {
  return el("span", { class: `pill ${kind}`, title }, text);
}

function cutNote(attempt) {
  if (!attempt.cut) return null;
  const [at, count] = attempt.cut;
  return el("p", { class: "said" }, `${plural(count, "character")} are left out of this text, behind the ${at.toLocaleString("en")}th.`);
}

function bodyOf(card, query) {
  const { attempt, source } = card;
  let text = null;
  if (view === "tokens") text = shadedText(attempt);
  else if (view === "difference" && source) text = differenceText(source.text, attempt.text);
  else if (view === "source") text = el("div", { class: "text mono" }, ...marked(attempt.text, query));
  else text = renderedText(attempt.text, query);
  const empty = attempt.text ? null : el("p", { class: "said" }, "No text.");
  return [cutNote(attempt), empty, text];
}

function facts(attempt, trained) {
  const nodes = [
    "reward" in attempt
      ? pill(`reward ${number(attempt.reward)}`, attempt.correct ? "good" : "bad", attempt.correct ? "correct" : "not correct")
      : pill(attempt.correct ? "right" : "wrong", attempt.correct ? "good" : "bad"),
    "advantage" in attempt ? el("span", { title: "advantage, before weights and normaliser" }, `A ${signed(attempt.advantage)}`) : null,
    "own_advantage" in attempt ? el("span", { title: "advantage among the refinements, under their own prompt" }, `A ${signed(attempt.own_advantage)} among refinements`) : null,
    el("span", { class: "answer", title: "the answer that was found" }, attempt.answer === null ? "no answer" : attempt.answer),
    "tokens" in attempt ? el("span", {}, plural(attempt.tokens, "token")) : null,
    attempt.finished === false ? pill("cut", "warn", "ended by the limit of tokens") : null,
    attempt.status ? pill(attempt.status, "warn", "of the verdict") : null,
    trained ? null : pill("not trained on", "plain"),
  ];
  return nodes.filter(Boolean);
}

function toggleCard(card, open) {
  card.open = open;
  card.node.classList.toggle("open", open);
  card.button.setAttribute("aria-expanded", String(open));
  card.body.replaceChildren(...(open ? bodyOf(card, present.query).filter(Boolean) : []));
  card.body.hidden = !open;
}

function makeCard(label, attempt, trained, source = null) {
  const card = { label, attempt, source, open: false };
  card.button = el("button", { type: "button", class: "card-head", "aria-expanded": "false", on: { click: () => toggleCard(card, !card.open) } },
    el("strong", {}, label), ...facts(attempt, trained), el("span", { class: "preview" }, attempt.text.slice(0, 200)));
  card.body = el("div", { class: "card-body", hidden: true });
  card.node = el("div", { class: `card ${attempt.correct ? "right" : "wrong"}` }, card.button, card.body);
  return card;
}

function critiqueNode(attempt, query) {
  if (!("critique" in attempt)) return null;
  const said = attempt.critic;
  const parts = [];
  if (said) {
    if (said.verdict !== null) parts.push(`says ${said.verdict ? "correct" : "incorrect"}`);
    if (said.agrees !== null) parts.push(said.agrees ? "as the rule says" : "against the rule");
    parts.push(plural(said.tries, "try", "tries"));
    if (said.fallback) parts.push("a template stands in");
  }
  const head = el("p", { class: "critique-head" }, el("strong", {}, "Critique"), parts.length ? ` – ${parts.join(", ")}` : "");
  const text = attempt.critique === null ? el("p", { class: "said" }, "Nothing usable was written.") : renderedText(attempt.critique, query);
  return el("div", { class: "critique" }, head, text);
}

/** A square for each attempt, as a map of the problem. */
function attemptMap(cards) {
  const squares = cards.map((card) => {
    const click = () => {
      toggleCard(card, true);
      card.node.scrollIntoView({ block: "nearest" });
      card.button.focus({ preventScroll: true });
    };
    const kind = `${card.attempt.correct ? "right" : "wrong"}${card.source ? " refined" : ""}`;
    return el("button", { type: "button", class: `square ${kind}`, title: `${card.label}, ${"reward" in card.attempt ? `reward ${number(card.attempt.reward)}` : card.attempt.correct ? "right" : "wrong"}`, "aria-label": card.label, on: { click } });
  });
  return el("div", { class: "map" }, ...squares);
}

/** Whether a refinement is a row of the update, under the question or under its own prompt. */
function isTrained(group, index) {
  return group.selected.includes(index) || (group.own_group || []).includes(index);
}

function cardsOf(group, query) {
  const [cards, nodes] = [[], []];
  const refinements = group.refinements.map((attempt, index) => ({ attempt, index }));
  group.responses.forEach((attempt, index) => {
    const card = makeCard(`Response ${index + 1}`, attempt, group.kept.includes(index));
    cards.push(card);
    const own = refinements.filter((refinement) => refinement.attempt.source === index);
    const refined = own.map((refinement) => {
      const label = `Refinement ${refinement.index + 1} of response ${index + 1}`;
      const trained = isTrained(group, refinement.index);
      cards.push(Object.assign(makeCard(label, refinement.attempt, trained, attempt), { trained }));
      return cards[cards.length - 1];
    });
    card.refinements = refined;
    nodes.push(el("div", { class: "chain" }, card.node, critiqueNode(attempt, query), ...refined.map((one) => one.node)));
  });
  for (const { attempt, index } of refinements.filter((one) => !(one.attempt.source in group.responses))) {
    const label = attempt.sampled === false ? "Trace of the data" : `Refinement ${index + 1} of all wrong responses`;
    const card = Object.assign(makeCard(label, attempt, isTrained(group, index)), { refinements: [] });
    cards.push(card);
    nodes.push(el("div", { class: "chain" }, card.node));
  }
  return { cards, nodes };
}

/** Opens what tells most: a refinement that is trained on beneath its response, else the first response. */
function openFirst(cards) {
  const responses = cards.filter((card) => !card.source);
  const chosen = responses.find((card) => card.refinements.some((one) => one.trained)) || responses[0];
  for (const card of chosen ? [chosen, ...chosen.refinements] : []) toggleCard(card, true);
}

function viewControl() {
  const buttons = Object.entries(VIEWS).map(([name, label]) =>
    el("button", { type: "button", "aria-pressed": String(name === view), on: { click: () => setView(name) } }, label));
  return el("div", { class: "segments", role: "group", "aria-label": "View" }, ...buttons);
}

function setView(name) {
  view = name;
  if (!present) return;
  const control = viewControl();
  present.control.replaceWith(control);
  present.control = control;
  present.legend.hidden = view !== "tokens";
  for (const card of present.cards) if (card.open) toggleCard(card, true);
}

function nextView() {
  const names = Object.keys(VIEWS);
  setView(names[(names.indexOf(view) + 1) % names.length]);
}

/** Moves to the next (+1) or previous (-1) attempt and opens it. */
function moveAttempt(by) {
  if (!present || !present.cards.length) return;
  const focused = present.cards.findIndex((card) => card.button === document.activeElement);
  const at = focused < 0 ? (by > 0 ? 0 : present.cards.length - 1) : focused + by;
  const card = present.cards[Math.max(0, Math.min(present.cards.length - 1, at))];
  toggleCard(card, true);
  card.button.focus({ preventScroll: true });
  card.node.scrollIntoView({ block: "nearest" });
}

function elsewhereNode(item, others, go) {
  if (!others.length) return null;
  const links = others.slice(0, 12).map((other) =>
    el("button", { type: "button", class: "link", on: { click: () => go(other) } }, `${[other.runName, stepOf(other)].filter(Boolean).join(", ") || "elsewhere"}: ${STATUS[other.status].label.toLowerCase()}`));
  const more = others.length > 12 ? ` and ${others.length - 12} more` : "";
  return el("p", { class: "elsewhere" }, "The same question: ", ...links.flatMap((link, index) => (index ? [", ", link] : [link])), more);
}

/** Shows a problem. `others`: the same question elsewhere; `go` shows one of them. */
function showDetail(item, query, others, go) {
  const detail = byId("detail");
  if (!item) {
    present = null;
    detail.replaceChildren(el("p", { class: "empty" }, "No problem is like this."));
    return;
  }
  const group = item.group;
  const { cards, nodes } = cardsOf(group, query);
  present = { item, query, cards, control: viewControl(), legend: shadeLegend() };
  present.legend.hidden = view !== "tokens";
  const place = [item.runName, stepOf(item), `problem ${item.index + 1}`, group.tag].filter(Boolean).join(" · ");
  const all = (open) => () => cards.forEach((card) => toggleCard(card, open));
  detail.replaceChildren(
    el("div", { class: "place" }, el("span", {}, place), pill(STATUS[item.status].label, STATUS[item.status].kind)),
    el("h3", {}, "Question"),
    el("div", { class: "question" }, renderedText(group.question, query)),
    el("p", { class: "gold" }, el("strong", {}, "Gold answer "), el("span", { class: "answer" }, group.answer)),
    ...[elsewhereNode(item, others, go)].filter(Boolean),
    el("div", { class: "tools" }, attemptMap(cards), present.control,
      el("button", { type: "button", class: "link", on: { click: all(true) } }, "open all"),
      el("button", { type: "button", class: "link", on: { click: all(false) } }, "close all")),
    present.legend,
    ...nodes,
  );
  openFirst(cards);
  detail.scrollTop = 0;
}
