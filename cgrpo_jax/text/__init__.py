"""Text to ids and back: chat turns that no text can forge, and the texts of the paper.

In: turns and contents. Out: prompt ids, decoded responses.
May import: errors, model, records.
"""

import os

# transformers says on import that there is no PyTorch, which nothing here needs, and goes on to advise.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
