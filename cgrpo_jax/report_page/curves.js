"use strict";
// Curves of all runs, a panel for what belongs together. All panels share the cursor and the range of steps.

const PANELS = [
  { title: "Reward", unit: "mean reward", names: { "reward/responses": "responses", "reward/refinements": "refinements" } },
  { title: "Held-out accuracy", unit: "pass@1", evaluations: true },
  { title: "Refinement", unit: "share of problems", unitRange: true,
    names: { "refine/rate": "refined", "refine/success": "of these fixed" } },
  { title: "Problems", unit: "share of problems", unitRange: true,
    names: { "problems/solve_all": "all responses right", "problems/solve_none": "none right" } },
  { title: "Loss", unit: "loss", names: { "loss/total": "total" }, without: "reward/responses" },
  { title: "Entropy", unit: "nats per token", names: { "policy/entropy": "policy" } },
  { title: "Length", unit: "tokens", names: { "length/responses": "responses", "length/refinements": "refinements" } },
  { title: "Cut at the limit", unit: "share", unitRange: true,
    names: { "truncated/responses": "responses", "truncated/refinements": "refinements" } },
  { title: "Gradient norm", unit: "norm, before clipping", names: { "policy/grad_norm": "gradient" } },
  { title: "Sampler against trainer", unit: "|Δ log p|, nats", logarithmic: true,
    names: { "sampler/logp_diff_mean": "mean", "sampler/logp_diff_max": "largest" } },
  { title: "Time per step", unit: "seconds", prefix: "seconds/" },
  { title: "Speed", unit: "tokens per second", prefix: "tokens_per_s/" },
];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3]];
const SMOOTHINGS = [1, 5, 20, 100];
const plots = []; // {plot, draw}

/** Mean of each value and those before it, at most `width` known ones in a row of points. */
function smoothed(values, width) {
  if (width === 1) return values;
  return values.map((value, index) => {
    if (value === null) return null;
    const known = values.slice(Math.max(0, index - width + 1), index + 1).filter((one) => one !== null);
    return known.reduce((sum, one) => sum + one, 0) / known.length;
  });
}

/** {name: label} of what a panel shows, of those that some run has. */
function namesOf(panel, runs) {
  const has = (name) => runs.some((run) => name in run.training.values);
  if (panel.without && has(panel.without)) return {};
  if (panel.evaluations) {
    const all = [...new Set(runs.flatMap(accuracyNames))];
    return Object.fromEntries(all.map((name) => [name, name.replace(/^eval\//, "")]));
  }
  if (panel.prefix) {
    const all = [...new Set(runs.flatMap((run) => Object.keys(run.training.values)))];
    const own = all.filter((name) => name.startsWith(panel.prefix));
    return Object.fromEntries(own.map((name) => [name, name.slice(panel.prefix.length)]));
  }
  return Object.fromEntries(Object.entries(panel.names).filter(([name]) => has(name)));
}

/** The curves of a panel: {label, hue, dash, steps, values, low?, high?} each. */
/** Whether the answers of all runs' evaluations were drawn in the same way; then it stands in the title, else by each. */
function drawnAlike(runs) {
  return runs.every((run) => run.drawn === runs[0].drawn);
}

function linesOf(panel, runs) {
  const several = runs.length > 1;
  const lines = [];
  runs.forEach((run, runIndex) => {
    const curves = panel.evaluations ? run.evaluations : run.training;
    Object.entries(namesOf(panel, runs)).forEach(([name, label], nameIndex) => {
      if (!(name in curves.values)) return;
      const hueIndex = several ? runIndex : nameIndex;
      const dash = several ? nameIndex : 0;
      const how = panel.evaluations && !drawnAlike(runs) && run.drawn ? ` (${run.drawn})` : "";
      const line = { label: several ? `${run.name}: ${label}${how}` : label, hue: hueIndex, dash, run: runIndex };
      Object.assign(line, { steps: curves.steps, values: curves.values[name] });
      if (panel.evaluations) {
        [line.low, line.high] = [curves.values[`${name}/low`], curves.values[`${name}/high`]];
      }
      lines.push(line);
    });
  });
  return lines;
}

/** Values at the steps of the panel, null where a curve has none. */
function aligned(steps, line, values) {
  const at = new Map(line.steps.map((step, index) => [step, values[index]]));
  return steps.map((step) => (at.has(step) ? at.get(step) : null));
}

/** Columns for uPlot: steps, then of each line its values and, where there is one, its interval. */
function columnsOf(panel, lines, width) {
  const steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
  const columns = [steps];
  for (const line of lines) {
    const own = panel.evaluations ? line.values : smoothed(line.values, width);
    columns.push(aligned(steps, line, own));
    if (line.low) columns.push(aligned(steps, line, line.high), aligned(steps, line, line.low));
  }
  return columns.map((column, index) =>
    index && panel.logarithmic ? column.map((value) => (value > 0 ? value : null)) : column,
  );
}

function seriesOf(lines, few) {
  const series = [{ label: "step" }];
  const bands = [];
  for (const line of lines) {
    line.at = series.length;
    const stroke = () => hue(line.hue);
    series.push({
      label: line.label, stroke, width: 1.75, dash: DASHES[line.dash % 4], spanGaps: true,
      points: { show: few, size: 5, fill: stroke },
    });
    if (line.low) {
      bands.push({ series: [line.at + 1, line.at + 2], fill: () => `${hue(line.hue)}22` });
      for (const side of ["high", "low"]) {
        series.push({ label: side, stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
      }
    }
  }
  return { series, bands };
}

function axis(label, extra = {}) {
  const faint = () => colour("grid");
  return {
    label, labelSize: 20, labelFont: "12px system-ui, sans-serif", font: "11px system-ui, sans-serif",
    labelGap: 2, stroke: () => colour("muted"), grid: { stroke: faint, width: 1 },
    ticks: { stroke: faint, width: 1, size: 4 }, ...extra,
  };
}

function rangeOf(panel) {
  if (panel.logarithmic) return { distr: 3 };
  if (panel.unitRange) return { range: [-0.02, 1.02] };
  return { range: (plot, low, high) => {
    const pad = (high - low || Math.abs(high) || 1) * 0.08;
    return [low >= 0 ? Math.max(0, low - pad) : low - pad, high + pad];
  } };
}

/** Sets the range of steps of every panel; null: all there are. */
function zoom(range) {
  for (const { plot } of plots) {
    const steps = plot.data[0];
    const all = { min: steps[0], max: steps[steps.length - 1] };
    plot.setScale("x", range || (all.min === all.max ? { min: all.min - 1, max: all.max + 1 } : all));
  }
  byId("unzoom").hidden = !range;
}

function makePlot(panel, lines, holder, legend) {
  const columns = columnsOf(panel, lines, smoothingWidth());
  const { series, bands } = seriesOf(lines, columns[0].length <= 40);
  const options = {
    width: Math.max(200, holder.clientWidth), height: 210, series, bands, padding: [10, 12, 0, 0],
    legend: { show: false },
    scales: { x: { time: false }, y: rangeOf(panel) },
    axes: [axis("step", { size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5, 1e6] }),
      axis(panel.unit, { size: 52, values: (plot, splits) => splits.map((value) => (value === null ? "" : number(value))) })],
    cursor: {
      sync: { key: "steps", setSeries: false }, drag: { x: true, y: false, setScale: false },
      points: { size: 6 }, bind: { dblclick: () => () => zoom(null) },
    },
    hooks: {
      setSelect: [(plot) => {
        const { left, width } = plot.select;
        if (width < 4) return;
        const [min, max] = [plot.posToVal(left, "x"), plot.posToVal(left + width, "x")];
        plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        if (max - min > 1e-6) zoom({ min, max });
      }],
      setCursor: [(plot) => legend.show(plot.cursor.idx, plot.data)],
    },
  };
  const plot = new uPlot(options, columns, holder);
  legend.show(null, plot.data);
  return plot;
}

/** Names and values of a panel: those under the cursor, else the last ones. */
function makeLegend(lines, toggle) {
  const step = el("span", { class: "at" });
  const items = lines.map((line) => {
    const value = el("span", { class: "value" });
    const handler = (event) => {
      const shown = event.currentTarget.getAttribute("aria-pressed") !== "true";
      event.currentTarget.setAttribute("aria-pressed", String(shown));
      toggle(line, shown);
    };
    const button = el("button", { type: "button", class: "name", "aria-pressed": "true", on: { click: handler } },
      swatch(line.hue, line.dash), line.label, " ", value);
    return { line, value, button };
  });
  const known = (column) => column.reduce((last, one, index) => (one === null ? last : index), null);
  const show = (index, columns) => {
    step.textContent = typeof index === "number" ? `step ${number(columns[0][index])}` : "last";
    for (const { line, value } of items) {
      const at = typeof index === "number" ? index : known(columns[line.at]);
      value.textContent = at === null ? NONE : number(columns[line.at][at]);
      if (line.low && at !== null && columns[line.at][at] !== null) {
        value.textContent += ` ${interval(columns[line.at + 2][at], columns[line.at + 1][at])}`;
      }
    }
  };
  return { node: el("div", { class: "legend" }, ...items.map((item) => item.button), step), show };
}

function smoothingWidth() {
  return Number(byId("smoothing").value) || 1;
}

function addPanel(panel, runs, before = null, extra = null) {
  const lines = linesOf(panel, runs);
  if (!lines.length) return null;
  const entry = { plot: null, draw: null };
  const legend = makeLegend(lines, (line, shown) => entry.plot.setSeries(line.at, { show: shown }));
  const holder = el("div", { class: "plot" });
  const note = Object.keys(namesOf(panel, runs)).map((name) => runs.map((run) => run.notes[name]).find(Boolean));
  const how = panel.evaluations && drawnAlike(runs) ? runs[0].drawn : "";
  const title = el("h3", { title: note.find(Boolean) }, [panel.title, how].filter(Boolean).join(", "));
  const node = el("figure", { class: "panel" }, el("figcaption", {}, title, extra), legend.node, holder);
  byId("panels").insertBefore(node, before);
  entry.plot = makePlot(panel, lines, holder, legend);
  entry.draw = () => {
    entry.plot.setData(columnsOf(panel, lines, smoothingWidth()), false);
    entry.plot.redraw();
    legend.show(null, entry.plot.data);
  };
  plots.push(entry);
  new ResizeObserver(() => entry.plot.setSize({ width: Math.max(200, holder.clientWidth), height: 210 })).observe(holder);
  return { node, entry };
}

/** The last panel shows any metric that is asked for. */
function addChooser(runs) {
  const training = [...new Set(runs.flatMap((run) => Object.keys(run.training.values)))].sort();
  if (!training.length) return;
  let present = null;
  const choose = el("select", { "aria-label": "Metric" }, ...training.map((name) => el("option", { value: name }, name)));
  const show = () => {
    if (present) {
      present.entry.plot.destroy();
      present.node.remove();
      plots.splice(plots.indexOf(present.entry), 1);
    }
    const panel = { title: "Any metric", unit: "value", names: { [choose.value]: choose.value } };
    present = addPanel(panel, runs, null, choose);
  };
  choose.value = training.includes("loss/total") ? "loss/total" : training[0];
  choose.addEventListener("change", () => {
    show();
    choose.focus({ preventScroll: true }); // it moved, with its panel
  });
  show();
}

function drawCurves(runs) {
  const choices = SMOOTHINGS.map((width) => el("option", { value: width }, width === 1 ? "none" : `mean of ${width} points`));
  byId("smoothing").append(...choices);
  for (const panel of PANELS) addPanel(panel, runs);
  addChooser(runs);
  if (!plots.length) byId("panels").append(el("p", { class: "empty" }, "These runs have no metrics of training."));
  byId("smoothing").addEventListener("change", () => plots.forEach((entry) => entry.draw()));
  byId("unzoom").addEventListener("click", () => zoom(null));
  const repaint = () => plots.forEach((entry) => entry.plot.redraw(false, true));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  const thinned = runs.filter((run) => run.training.each > 1);
  const said = thinned.map((run) => `${run.name}: a point stands for ${run.training.each} steps (their mean; the largest of what is called max).`);
  byId("curves-said").textContent = said.join(" ");
  byId("curves-said").hidden = !said.length;
}
