"""Accuracy of a checkpoint: held-out problems are sampled and graded, with intervals, tests, tables and plots.

In: problems and a sampler. Out: accuracies with their intervals.
May import: config, data, errors, grading, records, rollout, text, workdir.
"""
