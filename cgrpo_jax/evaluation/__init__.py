"""Accuracy of a checkpoint: samples and grades held-out problems, intervals, tests, tables and plots.

In: problems and a sampler. Out: figures with what they are worth.
May import: config, data, errors, grading, records, rollout, text, workdir.
"""
