"""Is an answer right? Finds the answer in a text and compares it with the gold.

In: problems and response texts. Out: scored attempts. Nothing that a model wrote is evaluated in this process. No jax.
May import: config, process, records.
"""
