"""Is an answer right? Finds the answer in a text and compares it with the gold.

In: problems and response texts. Out: scored attempts. What a model wrote is parsed in worker processes only. No jax.
May import: config, errors, process, records.
"""
