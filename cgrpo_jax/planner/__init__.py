"""Tells memory, bytes on the wire and seconds of a run from its compiled programs, before any machine is rented.

Read it in this order: making (the plan), programs (what a run compiles), figures with hlo and cost (what a compiled
program tells), memory (what else is in memory meanwhile), most (the most rows that fit), step (the seconds of a step),
printed (the plan as text and JSON). ahead compiles or runs the same programs before the first step of a run.

In: a configuration and the name of a topology. Out: a plan, and whether all fits.
May import: config, errors, learning, model, process, run, sampling, workdir.
"""
