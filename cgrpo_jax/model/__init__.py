"""The model: one decoder for all families, its weights in and out, where its parameters lie on the devices.

In: Hugging Face folders, ids and what each of them sees. Out: hidden states, logits, parameters.
May import: config, errors.
"""
