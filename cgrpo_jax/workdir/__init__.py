"""What a run leaves behind and what a person sees: checkpoints, metrics, rollouts, progress, compiled programs.

And what guards it: a lock, digests of arrays, the comparison of a run with the checkpoint it goes on from.

In: state, numbers, groups. Out: files of the workdir, lines on the terminal.
May import: config, errors, learning, model, records.
"""
