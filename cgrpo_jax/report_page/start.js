"use strict";
// The summary and the curves first, the rollouts once these are in sight.

const report = JSON.parse(byId("data").textContent);
drawStrip(report);
drawCurves(report.runs);
drawEvaluation(report);
drawConfig(report.runs);
requestAnimationFrame(() => setTimeout(() => {
  drawRollouts(report);
  document.documentElement.dataset.ready = performance.now().toFixed(0); // milliseconds since it was opened;
}));
