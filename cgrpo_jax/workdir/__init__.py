"""The files that a run leaves and the terminal that a person watches: checkpoints, metrics, rollouts, progress.

Also the lock of a workdir, digests of arrays, the cache of compiled programs, and the comparison of a resumed run with
its checkpoint.

In: state, numbers, groups. Out: files of the workdir, lines on the terminal.
May import: config, errors, learning, model, records.
"""
