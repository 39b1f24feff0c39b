"""From a question to a group: sample, score, criticise, refine, select. Only `stories` knows of engines.

In: problems, a critic, a scorer. Out: groups of attempts, and which of them are trained on.
May import: config, data, errors, grading, process, records, sampling, text.
"""
