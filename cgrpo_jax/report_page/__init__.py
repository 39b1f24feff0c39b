"""The report of runs: one HTML file that holds its data, its scripts and its styles, and asks for nothing else.

In: workdirs. Out: the page.
May import: config, data, errors, evaluation, learning, workdir.
"""
