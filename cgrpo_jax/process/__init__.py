"""What concerns processes: how a run is asked to stop, how its hosts agree, where functions of the user run.

In: signals, dotted names of functions. Out: a flag, shared values, results of calls.
May import: errors.
"""
