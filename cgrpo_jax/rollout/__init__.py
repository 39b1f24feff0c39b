"""From a question to a group: sample, score, criticise, refine, select. Only `loop` knows of engines.

In: problems, a critic, a scorer. Out: groups of attempts, and what to train on.
May import: config, data, errors, grading, process, records, sampling, text.
"""
