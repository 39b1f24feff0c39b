"""What a run leaves behind and what a person sees: checkpoints, metrics, rollouts, progress, compiled programs.

In: state, numbers, groups. Out: files of the workdir, lines on the terminal.
May import: learning and model, and what these may.
"""
