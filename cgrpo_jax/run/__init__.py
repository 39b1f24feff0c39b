"""Opening a run: everything that stays the same over its steps is built, checked and, at fault, refused here.

In: a configuration, a workdir, devices. Out: the run, what its leader holds, its newest checkpoint.
May import: config, data, errors, evaluation, grading, learning, model, process, records, report, rollout, sampling,
text, workdir.
"""
