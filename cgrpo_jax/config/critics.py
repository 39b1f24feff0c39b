"""The critics that `refine.critique` can name: one record each, which everything that asks about a critic reads.

No jax and nothing of this package: options, checks, `--help` and the planner read it before anything is opened.
`rollout/written.py` binds a record to what it asks when a run is opened.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

# Who writes a critique: a fixed sentence, the step checker of a generated task, a column of the data, the policy, the
# second model (options.LocalConfig), a server (options.ApiConfig), a function of the user.
By = Literal["template", "task", "column", "policy", "second", "server", "function"]
REFERENCES = ("none", "gt", "solution")  # what a critic may be shown beside question and attempt


@dataclasses.dataclass(frozen=True)
class Critic:
    """What is known of a critic before anything is opened."""

    name: str
    by: By
    help: str
    # Of REFERENCES; None: what the option `reference` of its own section (api, local) says.
    shown: str | None = "none"
    concludes: bool = False  # each critique is to end in `Conclusion: correct` or `Conclusion: incorrect`
    scores: bool = False  # its verdict is the reward of the attempt

    @property
    def sampled(self) -> bool:
        """Whether its texts are sampled here, from the policy or from the second model."""
        return self.by in ("policy", "second")

    @property
    def is_model(self) -> bool:
        return self.sampled or self.by == "server"

    @property
    def retries(self) -> bool:
        """Whether a text that does not count is written anew (`refine.critique_tries`)."""
        return self.is_model and not self.scores

    @property
    def accepts(self) -> bool:
        """Whether `refine.critique_accept` decides which of its texts count."""
        return self.retries and self.concludes

    @property
    def falls_back(self) -> bool:
        """Whether `refine.critique_fallback` stands in where it has nothing to say."""
        return self.retries or self.by == "function"

    @property
    def judges(self) -> bool:
        """Whether its critiques say that an attempt is right or wrong, so that they can be inverted."""
        return self.concludes or not self.is_model

    def fallback(self, chosen: str, reference: str) -> str:
        """What stands in where no critique counts, of FALLBACKS without "auto": never more than the critic may say.

        Args:
          chosen: `refine.critique_fallback`.
          reference: what the critic is shown, of REFERENCES.
        """
        if chosen != "auto":
            return chosen
        return "drop" if not self.judges else "indicative" if reference == "none" else "indicative_gt"


_TABLE = (
    Critic("indicative", "template", "right or wrong"),
    Critic("indicative_gt", "template", "right or wrong, and the ground truth", "gt"),
    Critic("worked", "task", "the first wrong step, of data.source=arithmetic", concludes=True),
    Critic("offline", "column", "the data's column `critique`", concludes=True),
    Critic("self_gt", "policy", "the policy's, which sees the ground truth", "gt", concludes=True),
    Critic("self_eval", "policy", "the policy's, and its verdict is the reward", concludes=True, scores=True),
    Critic("no_verdict", "policy", "the policy's: what is wrong, never whether something is"),
    Critic("api", "server", "a server's, see api.*", None, concludes=True),
    Critic("local", "second", "a second model's, see local.*", None, concludes=True),
    Critic("function", "function", "yours, see critique_fn"),
)
CRITICS = {critic.name: critic for critic in _TABLE}
FALLBACKS = ("auto", "drop", *(name for name, critic in CRITICS.items() if critic.by == "template"))
