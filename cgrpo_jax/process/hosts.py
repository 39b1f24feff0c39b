"""One host thinks, all hosts compute: how the processes of a run tell each other what the leader found.

Every process runs the same program and takes part in the same device computations, as multi-controller JAX wants it.
The leader (process 0) alone has data, graders, critics, files and clocks. Whatever follows from those (the requests of
a chunk of decoding, the segments of an update, whether to stop) it finds inside `share`, which gives it to all.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, Protocol, TypeVar

T = TypeVar("T")


class Hosts(Protocol):
    """The processes of a run, as one of them sees them."""

    leader: bool

    def share(self, find: Callable[[], T]) -> T:
        """What `find` returns on the leader, which alone calls it; on every host, at the same place of the program.

        An exception of `find` ends the call on every host: the leader raises it, the others raise what says so. A run
        of several hosts is stopped here and nowhere else, because here all of them can leave together.

        Raises:
          Stopped: the leader was asked to stop while it looked for the answer.
          HostsError: the leader ended by an error of its own.
        """

    def meet(self, purpose: str) -> None:
        """Returns when every host has called it. Says every 30 seconds which hosts are missing, and for what."""

    def does(self, what: str) -> None:
        """Notes what this host does now, which the others tell if it is lost."""

    def check_alike(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """Raises ConfigError, on every host, where hosts differ in a fact: name -> value or digest."""

    def check_folder(self, folder: pathlib.Path) -> None:
        """Raises ConfigError, on every host, where one does not see what the leader writes into the folder."""

    def part(self) -> None:
        """The run is over, on every host."""

    def leave(self, code: int, why: str, by_device: bool = False) -> NoReturn:
        """Ends the process with this exit code, saying why, and with it those of the other hosts.

        Args:
          by_device: a device program failed, perhaps because another host is gone; then that is said.
        """


class OneHost:
    """A run of one process: there is nobody to tell."""

    leader = True

    def share(self, find: Callable[[], T]) -> T:
        return find()

    def meet(self, purpose: str) -> None:
        """Everybody is here."""

    def does(self, what: str) -> None:
        """Nobody else would tell it."""

    def check_alike(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """One host is like itself."""

    def check_folder(self, folder: pathlib.Path) -> None:
        """One host sees what it writes."""

    def part(self) -> None:
        """There is nobody to part from."""

    def leave(self, code: int, why: str, by_device: bool = False) -> NoReturn:
        if code == 1:
            sys.exit(why)
        print(why, file=sys.stderr)
        sys.exit(code)


ONE_HOST: Hosts = OneHost()
