"""One host thinks, all hosts compute.

The leader alone has data, graders, critics, files and clocks. What it finds out it shares: the requests of each chunk,
the bins of each update, and whether to stop. The other hosts run the same device programs on what they are told.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

T = TypeVar("T")


class Hosts(Protocol):
    """How the processes of a run tell each other what the leader found."""

    leader: bool

    def share(self, found: T | None) -> T:
        """The leader's `found`, on every host; called from the main thread, in the same order on each of them."""


class OneHost:
    """A run of one process: there is nobody to tell."""

    leader = True

    def share(self, found: T | None) -> T:
        return found  # type: ignore[return-value]  # the leader always has it


ONE_HOST: Hosts = OneHost()
