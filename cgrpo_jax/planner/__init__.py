"""What a run needs, told from its compiled programs before any machine is rented: memory, bytes on the wire, seconds.

In: a configuration and the name of a topology. Out: a table, and whether all fits.
May import: config, learning, model, process, run, sampling, workdir.
"""
