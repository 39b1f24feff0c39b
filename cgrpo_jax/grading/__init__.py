"""Is an answer right? Finds the answer in a text and compares it with the gold.

In: problems and response texts. Out: verdicts. Nothing that a model wrote is evaluated in this process. No jax.
May import: options and records.
"""
