"""From a question to a group: sample, score, criticise, refine, select. No arrays of a device, no jax.

In: problems, a critic, a scorer. Out: groups of attempts, and what to train on.
May import: critics, data, grading, options, records, secrecy, stopping, text, trusted, user_process.
"""
