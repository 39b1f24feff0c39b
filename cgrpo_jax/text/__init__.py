"""Text to ids and back: chat turns that no text can forge, and the texts of the paper.

In: turns and contents. Out: prompt ids, decoded responses.
May import: model, records.
"""
