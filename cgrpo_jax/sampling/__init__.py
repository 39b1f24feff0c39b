"""The sampler: who enters which row when, the programs that prefill and decode, how a token is drawn.

In: parameters and a source of requests. Out: completions, with log-probabilities at the sampling temperature.
May import: config, model, records.
"""
