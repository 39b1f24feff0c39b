"use strict";
// The summary and the curves first, the rollouts once these are in sight.

const report = JSON.parse(byId("data").textContent);
for (const { name, damaged } of report.runs) {
  for (const line of damaged) byId("damaged").append(el("p", { class: "said" }, `${name}: ${line}`));
}
drawStrip(report);
drawCurves(report.runs);
drawEvaluation(report);
drawConfig(report.runs);
requestAnimationFrame(() => setTimeout(() => {
  drawRollouts(report);
  document.documentElement.dataset.ready = performance.now().toFixed(0); // milliseconds since it was opened;
}));
