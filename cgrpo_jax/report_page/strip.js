"use strict";
// What is looked at first: which run, how far, how good.

/** The first and the last known value of a curve: [step, value] each, or null. */
function ends(curves, name) {
  const values = curves.values[name] || [];
  const known = values.map((value, index) => [curves.steps[index], value]).filter(([, value]) => value !== null);
  return known.length ? [known[0], known[known.length - 1]] : null;
}

/** Names of accuracies of a run's evaluations while it trained, the whole before its tags. */
function accuracyNames(run) {
  return Object.keys(run.evaluations.values).filter((name) => /\/pass@1(\/|$)/.test(name) && !/\/(low|high)$/.test(name));
}

/** Which steps two values are of; it stays on one line. */
function between(first, last) {
  return `step\u00a0${first}\u00a0→\u00a0${last}`;
}

function interval(low, high) {
  return `[${share(low)}, ${share(high)}]`;
}

/** {value, beside, note}: the accuracy that counts. */
function accuracyFact(run) {
  if (run.results) {
    const mean = run.results.mean;
    const names = run.results.tasks;
    const what = names.length === 1 ? names[0] : `mean of ${plural(names.length, "task")}`;
    return { value: share(mean["pass@1"]), beside: interval(mean["pass@1/low"], mean["pass@1/high"]), note: `${run.drawn}; ${what}, 95 % interval` };
  }
  const name = accuracyNames(run)[0];
  const found = name && ends(run.evaluations, name);
  if (!found) return { value: NONE, beside: "", note: "not evaluated" };
  const [[firstStep, first], [step, last]] = found;
  const [low, high] = ["low", "high"].map((side) => ends(run.evaluations, `${name}/${side}`)?.[1][1]);
  const before = firstStep === step ? "" : `, ${share(first)} at step ${firstStep}`;
  return { value: share(last), beside: interval(low, high), note: `${[run.drawn, name].filter(Boolean).join("; ")}, step ${step}${before}; 95 % interval` };
}

/** First and last reward; of supervised training, which has none, the loss. */
function rewardFact(run) {
  const found = ends(run.training, "reward/responses");
  if (!found) {
    const loss = ends(run.training, "loss/total");
    if (!loss) return null;
    const [[, first], [, last]] = loss;
    return { label: "Loss", value: `${number(first, 3)} → ${number(last, 3)}`, note: "first step → last step" };
  }
  const [[firstStep, first], [step, last]] = found;
  return {
    label: "Reward",
    value: `${number(first, 3)} → ${number(last, 3)}`,
    note: `mean of responses, ${between(firstStep, step)}`,
  };
}

function fixedFact(run) {
  const found = ends(run.training, "refine/success");
  if (!found) return null;
  const [[firstStep, first], [step, last]] = found;
  return {
    label: "Fixed by refinement",
    value: `${number(first, 3)} → ${number(last, 3)}`,
    note: `share of refined problems, ${between(firstStep, step)}`,
  };
}

function stepsFact(run) {
  const done = run.training.steps[run.training.steps.length - 1];
  if (done === undefined) return null;
  const planned = run.planned && run.planned !== done ? `of ${number(run.planned)}` : "";
  const seconds = Object.entries(run.training.values).filter(([name]) => name.startsWith("seconds/"));
  const total = seconds.flatMap(([, values]) => values).reduce((sum, value) => sum + (value || 0), 0);
  const spent = total * run.training.each;
  const note = spent ? `${duration(spent)} in its phases` : "";
  return { label: "Steps", value: number(done), beside: planned, note };
}

function duration(seconds) {
  if (seconds < 90) return `${seconds.toFixed(0)} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

function fact({ label, value, beside = "", note = "" }) {
  return el(
    "div",
    { class: "fact" },
    el("dt", {}, label),
    el("dd", {}, el("span", { class: "value" }, value), " ", beside ? el("span", { class: "beside" }, beside) : null),
    note ? el("dd", { class: "note" }, note) : null,
  );
}

function drawStrip(data) {
  const several = data.runs.length > 1;
  document.title = `${data.runs.map((run) => run.name).join(", ")} – run report`;
  const rows = data.runs.map((run, index) => {
    const model = String(run.model).replace(/^package:\/\//, "").split("/").filter(Boolean).pop() || NONE;
    const title = el("h1", {}, several ? swatch(index) : null, run.name);
    const facts = [
      { label: "Method", value: run.method },
      { label: "Model", value: model, note: model === run.model ? "" : run.model },
      stepsFact(run),
      { label: "pass@1", ...accuracyFact(run) },
      rewardFact(run),
      fixedFact(run),
    ];
    return el("div", { class: "run" }, title, el("dl", { class: "facts" }, ...facts.filter(Boolean).map(fact)));
  });
  byId("strip").replaceChildren(...rows);
}
