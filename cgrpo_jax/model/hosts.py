"""One host thinks, all hosts compute.

The leader alone has data, tokenizer, graders, critics and clocks. What it finds is agreed on: per poll of the sampler
its requests, per update the bins, and whether to stop. The others follow, and run the same device programs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from cgrpo_jax.records import Done, Request, Source

T = TypeVar("T")


class Hosts(Protocol):
    """How the processes of a run agree. `agree` is called from the main thread, in the same order on every host."""

    leader: bool

    def agree(self, find: Callable[[], T]) -> T:
        """What `find` returns on the leader; elsewhere it is not called."""


class OneHost:
    """A run of one process: nothing to agree on."""

    leader = True

    def agree(self, find: Callable[[], T]) -> T:
        return find()


class AgreedSource:
    """A source that is the leader's on every host.

    Args:
      own: the leader's; None elsewhere.
    """

    def __init__(self, hosts: Hosts, own: Source | None):
        self.hosts, self.own, self.more = hosts, own, True

    def ended(self, done: Done) -> None:
        if self.own is not None:
            self.own.ended(done)

    def poll(self, idle: bool) -> Sequence[Request]:
        requests, self.more = self.hosts.agree(lambda: self._asked(idle))
        return requests

    def _asked(self, idle: bool) -> tuple[Sequence[Request], bool]:
        assert self.own is not None  # only the leader finds out
        return self.own.poll(idle), self.own.pending()

    def pending(self) -> bool:
        return self.more
