"""Problems: from files, the hub or a generator; the named tasks of an evaluation. All are built here.

In: options and rows. Out: problems, each checked before anything compiles. No jax.
May import: config, errors, grading, process, records, text, workdir.
"""
