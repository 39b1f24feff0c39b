"""The report of runs: one HTML file with its data, scripts and styles, which loads nothing from elsewhere.

In: workdirs. Out: the page.
May import: config, data, errors, evaluation, learning, workdir.
"""
