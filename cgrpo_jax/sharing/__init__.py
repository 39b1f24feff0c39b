"""A model for others: its card, and the upload to the Hugging Face hub.

In: an exported folder, its run and its evaluation. Out: a repository of the hub.
May import: config, data, errors, evaluation, model, report_page, workdir.
"""
