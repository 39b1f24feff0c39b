"use strict";
// Evaluations and configurations, runs side by side.

function notesOf(notes) {
  return notes.map((note) => el("p", { class: "hint" }, note));
}

/** While training: a row an accuracy, of each run the first, the best and the last with its interval. */
function trainingEvaluations(runs) {
  const own = runs.filter((run) => accuracyNames(run).length);
  if (!own.length) return [];
  const several = runs.length > 1;
  const names = [...new Set(own.flatMap(accuracyNames))];
  const pairs = names.flatMap((name) => own.filter((run) => name in run.evaluations.values).map((run) => [name, run]));
  const rows = pairs.map(([name, run]) => {
    const [[firstStep, first], [lastStep, last]] = ends(run.evaluations, name);
    const values = run.evaluations.values;
    const at = (step, side) => values[`${name}/${side}`]?.[run.evaluations.steps.indexOf(step)];
    const shown = (step, value) => `${share(value)} ${interval(at(step, "low"), at(step, "high"))}`;
    const known = values[name].filter((value) => value !== null);
    const best = Math.max(...known);
    const bestStep = run.evaluations.steps[values[name].indexOf(best)];
    const label = [name.replace(/^eval\//, ""), run.drawn].filter(Boolean).join(", ");
    const cells = [shown(firstStep, first), `step ${firstStep}`, shown(bestStep, best), `step ${bestStep}`, shown(lastStep, last), `step ${lastStep}`];
    return several ? [label, run.name, ...cells] : [label, ...cells];
  });
  const columns = ["while training", ...(several ? ["run"] : []), "first [95 %]", "", "best [95 %]", "", "last [95 %]", ""];
  return [textTable(columns, rows, { class: "numbers" }),
    el("p", { class: "hint" }, "Means over distinct held-out problems; Wilson intervals. The best is the best of several looks, so it flatters.")];
}

function drawEvaluation(data) {
  const nodes = trainingEvaluations(data.runs);
  for (const run of data.runs.filter((one) => one.results)) {
    const { columns, rows, notes, asked } = run.results;
    nodes.push(el("h3", {}, run.name), el("p", { class: "hint" }, asked), textTable(columns, rows, { class: "numbers" }), ...notesOf(notes));
  }
  if (data.compared) {
    nodes.push(el("h3", {}, "Compared"));
    if (data.compared.rows.length) nodes.push(textTable(data.compared.columns, data.compared.rows, { class: "numbers" }));
    nodes.push(...notesOf(data.compared.notes));
  }
  if (!nodes.length) nodes.push(el("p", { class: "empty" }, "These runs were not evaluated (eval.every, method=eval)."));
  byId("evaluation-body").replaceChildren(...nodes);
}

function groupOf(key) {
  return key.includes(".") ? key.split(".")[0] : "run";
}

/** The keys of one part of the configuration; where runs differ, that is marked. */
function configTable(group, rows, runs) {
  const names = runs.length > 1 ? runs.map((run) => run.name) : [""];
  const short = rows.map(([key, ...values]) => [groupOf(key) === "run" ? key : key.slice(group.length + 1), ...values]);
  const table = textTable([group, ...names], short, { class: "config" });
  table.querySelectorAll("tbody tr").forEach((node, index) => {
    node.classList.toggle("differs", new Set(rows[index].slice(1)).size > 1);
  });
  return el("div", { class: "group" }, table);
}

function drawConfig(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  const shown = (run, key) => (key in run.config ? JSON.stringify(run.config[key]).replace(/^"(.*)"$/s, "$1") : NONE);
  const draw = () => {
    const query = byId("config-search").value.trim().toLowerCase();
    const differing = byId("config-differing").checked;
    const rows = keys
      .map((key) => [key, ...runs.map((run) => shown(run, key))])
      .filter((row) => !query || row.join("\n").toLowerCase().includes(query))
      .filter((row) => !differing || new Set(row.slice(1)).size > 1);
    const groups = [...new Set(rows.map(([key]) => groupOf(key)))];
    const tables = groups.map((group) => configTable(group, rows.filter(([key]) => groupOf(key) === group), runs));
    byId("config-body").replaceChildren(...(rows.length ? tables : [el("p", { class: "empty" }, keys.length ? "No key is like this." : "What was asked for stands with the evaluation.")]));
  };
  byId("config-differing-label").hidden = runs.length < 2;
  byId("config-body").style.setProperty("--runs", runs.length);
  byId("config-search").addEventListener("input", draw);
  byId("config-differing").addEventListener("change", draw);
  draw();
}
