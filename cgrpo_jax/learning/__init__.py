"""The gradient: credit of each token (numpy), bins of segments, the objective (pure functions), the optax update.

In: groups of scored attempts. Out: a new train state and sums for the metrics.
May import: config, errors, model, records.
"""
