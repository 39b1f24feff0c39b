"""What a run needs, told from its compiled programs before any machine is rented: memory, bytes on the wire, seconds.

To be read in this order: command (the flags), making (the plan), programs (what a run compiles), figures with hlo and
cost (what a compiled program tells), memory (what lives beside it), most (the most rows that fit), step (seconds of a
step), report. ahead and preflight compile and try the same programs before the first step of a run.

In: a configuration and the name of a topology. Out: a table, and whether all fits.
May import: config, errors, learning, model, process, run, sampling, workdir.
"""
