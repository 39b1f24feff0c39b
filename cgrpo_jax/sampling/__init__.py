"""The sampler: which request enters which row when, the programs that prefill and decode, how a token is drawn.

In: weights and requests. Out: completions, with log-probabilities at the sampling temperature.
May import: config, model, records.
"""
