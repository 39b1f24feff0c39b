"""A run of several processes, one a host, which meet at JAX's coordination service and speak through its store of keys.

    python -m cgrpo_jax.main --hosts=ADDRESS:PORT,COUNT,INDEX ...     on each host, with its own INDEX

On the hosts of a TPU slice (TPU VMs, or a JobSet on GKE) JAX finds address, count and index by itself. A thread on each
host writes signs of life, with what the host does, and reads those of the others. Where one has ended or is silent, the
thread ends this process, too, which may be inside a device program that would wait for the other for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax._src import distributed  # the key-value store has no public name
from jax._src.clusters import cloud_tpu_cluster

from cgrpo_jax.errors import ConfigError, HostsError
from cgrpo_jax.process import stopping
from cgrpo_jax.process.hosts import ONE_HOST, Hosts
from cgrpo_jax.process.wire import packed, unpacked

T = TypeVar("T")

PIECE = 1 << 20  # bytes of a value of the store; a message has as many as it needs
NAP = 1.0  # seconds of one wait for a message; between two of them the main thread can handle a signal
BEAT = 1.0  # seconds between two signs of life
HEARTBEAT = 100.0  # seconds of silence after which JAX aborts every host; a long compilation is silent, too
SILENT = 10.0  # seconds before that at which a silent host is reported as lost here, with what it did
BEHIND = 64  # turns after which a message is removed from the store, once every host has read it
LOST = 75  # exit code where another host was lost: the same command may go on when it is back (EX_TEMPFAIL)
CPU_THREADS = 32  # least size of XLA's thread pool on a CPU
SEEN_WITHIN = 10.0  # seconds in which a file of one host is seen by the others
TOLD_EVERY = 30.0  # seconds between two lines about hosts that are missing


class Place(NamedTuple):
    """The place of a process in a run of several."""

    address: str  # HOST:PORT of the leader, where the coordination service listens
    hosts: int
    host: int  # index of this one


def place_of(text: str) -> Place | None:
    """What --hosts says; None: this process is alone.

    Raises:
      ConfigError: it is not ADDRESS:PORT,COUNT,INDEX.
    """
    if not text:
        return None
    address, *numbers = text.split(",")
    host, _, port = address.rpartition(":")
    right = bool(host) and port.isdigit() and len(numbers) == 2 and all(number.strip().isdigit() for number in numbers)
    if not right or not int(numbers[1]) < int(numbers[0]):
        raise ConfigError(
            f"--hosts={text}: give ADDRESS:PORT,COUNT,INDEX, as 10.0.0.2:8476,4,0 on the first of four hosts and ...,3 "
            "on the last"
        )
    return Place(address, int(numbers[0]), int(numbers[1]))


class Pod:
    """The hosts of a run, as one of them sees them. See `hosts.Hosts`."""

    def __init__(self, count: int, index: int, client: Any, log: Callable[[str], None]):
        self.count, self.index, self.leader, self.client, self.log = count, index, index == 0, client, log
        self.turn = 0  # calls of `share` and `meet` so far, which are the same on every host
        self.doing = "start"
        self.bytes = 0  # of the leader's messages so far
        self.over = threading.Event()
        threading.Thread(target=self._watch, daemon=True, name="hosts").start()

    def does(self, what: str) -> None:
        self.doing = what

    # ---- Messages ----
    def share(self, find: Callable[[], T]) -> T:
        self.turn += 1
        if self.turn % BEHIND == 0:  # everything before this turn was heard here
            self._sign(f"heard/{self.turn}")
        if not self.leader:
            return self._heard()
        try:
            found = find()
        except BaseException as error:
            stopped = stopping.exit_code() - 128 if isinstance(error, stopping.Stopped) else 0
            self._tell({"stopped": stopped} if stopped else {"ended": told_of(error)})
            raise
        self._tell({"found": found})
        return found

    def _tell(self, message: Mapping[str, Any]) -> None:
        data = packed(message)
        pieces = [data[first : first + PIECE] for first in range(0, len(data), PIECE)]
        for number, piece in enumerate(pieces):
            head = len(pieces).to_bytes(4, "big") if number == 0 else b""
            self.client.key_value_set_bytes(f"told/{self.turn}/{number}", head + piece)
        self.bytes += len(data)
        self._forget(self.turn - BEHIND)

    def _forget(self, last: int) -> None:
        """Removes the messages before turn `last`, once each host has heard them and said so."""
        if last <= 0 or last % BEHIND:
            return
        self._until_all(f"heard/{last}", "hear the leader")
        for turn in range(last - BEHIND, last):
            self.client.key_value_delete(f"told/{turn}/")
        self.client.key_value_delete(f"heard/{last}/")

    def _heard(self) -> Any:
        first = self._get(f"told/{self.turn}/0")
        rest = [self._get(f"told/{self.turn}/{n}") for n in range(1, int.from_bytes(first[:4], "big"))]
        message = unpacked(b"".join([first[4:], *rest]))
        self.bytes += len(first) - 4 + sum(map(len, rest))
        if "stopped" in message:
            stopping.ask(message["stopped"])
            raise stopping.Stopped
        if "ended" in message:
            raise HostsError(f"host 0 ended: {message['ended']}")
        return message["found"]

    def _get(self, key: str) -> bytes:
        while True:
            try:
                return self.client.blocking_key_value_get_bytes(key, int(NAP * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise HostsError(f"host 0 is not to be reached: {told_of(error)}") from error

    # ---- Meetings ----
    def meet(self, purpose: str) -> None:
        self.turn += 1
        key = f"met/{self.turn}"
        self._sign(key)
        self._until_all(key, purpose)

    def _sign(self, key: str) -> None:
        self.client.key_value_set(f"{key}/{self.index}", "")

    def _until_all(self, key: str, purpose: str) -> None:
        told = time.monotonic()
        while missing := set(range(self.count)) - self._signed(key):
            if time.monotonic() > told + TOLD_EVERY:
                told = time.monotonic()
                self.log(f"host {self.index}: waiting for {named(missing)} to {purpose}")
            time.sleep(0.05)

    def _signed(self, key: str) -> set[int]:
        return {int(name.rsplit("/", 1)[1]) for name, _ in self.client.key_value_dir_get(f"{key}/")}

    def check_alike(self, facts: Callable[[], Mapping[str, str]]) -> None:
        """See `hosts.Hosts`. The message names the first host that differs from the leader, and in what."""
        own, folder = dict(facts()), f"facts/{self.turn}/"
        self.client.key_value_set(f"{folder}{self.index}", json.dumps(own))
        self.meet("say what they run")

        def difference() -> str:
            said = self.client.key_value_dir_get(folder)
            found = {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in said}
            for host, of_host in sorted(found.items()):
                for name, value in own.items():
                    if of_host.get(name) != value:
                        return f"host {host} has another {name} than host 0 ({of_host.get(name)}, not {value})"
            return ""

        if wrong := self.share(difference):
            raise ConfigError(f"{wrong}; all hosts of a run start alike")

    def check_folder(self, folder: pathlib.Path) -> None:
        """See `hosts.Hosts`. A file that was just written may take seconds to be seen over a network."""

        def written() -> pathlib.Path:
            mark = folder / f".hosts-{secrets.token_hex(8)}"
            mark.touch()
            return mark

        mark = folder / self.share(lambda: written().name)
        deadline = time.monotonic() + SEEN_WITHIN
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        self._sign(f"sees/{mark.name}/{'yes' if mark.exists() else 'no'}")
        self.meet(f"look into {folder}")
        blind = self.share(lambda: sorted(self._signed(f"sees/{mark.name}/no")))
        if self.leader:
            mark.unlink()
        if blind:
            raise ConfigError(
                f"--workdir={folder}: {named(set(blind))} cannot see what host 0 writes there; give a folder that all "
                "hosts mount"
            )

    # ---- Life and death ----
    def _watch(self) -> None:
        """Signs of life of this host, and what became of the others."""
        seen: dict[int, tuple[str, float]] = {}
        beat = 0
        while not self.over.wait(BEAT):
            beat += 1
            try:
                self.client.key_value_set(f"alive/{self.index}", f"{beat} {self.doing}", allow_overwrite=True)
                self._hear_signals()
                for key, said in self.client.key_value_dir_get("ended/"):
                    host = int(key.rsplit("/", 1)[1])
                    if host != self.index:
                        code, _, why = said.partition(" ")
                        self._end(int(code), f"host {host} ended: {why}")
                for key, said in self.client.key_value_dir_get("alive/"):
                    self._look_at(int(key.rsplit("/", 1)[1]), said, seen)
            except jax.errors.JaxRuntimeError as error:
                if not self.over.is_set():
                    last = seen.get(0, ("nothing", 0.0))[0].partition(" ")[2]
                    self._end(LOST, f"host 0 is lost, the last thing it did: {last} ({str(error).splitlines()[0]})")

    def _look_at(self, host: int, said: str, seen: dict[int, tuple[str, float]]) -> None:
        before = seen.get(host, ("", 0.0))
        if said != before[0]:
            seen[host] = said, time.monotonic()
        elif time.monotonic() > before[1] + HEARTBEAT - SILENT:
            doing, silent = said.partition(" ")[2], HEARTBEAT - SILENT
            self._end(LOST, f"host {host} is lost: no sign of life for {silent:.0f} s, the last thing it did: {doing}")

    def _hear_signals(self) -> None:
        """Tells the leader of this host's signals; the leader, once it knows of one, stops where it next looks."""
        if number := stopping.waiting():
            self.client.key_value_set(f"stop/{self.index}", str(number), allow_overwrite=True)
        if self.leader:
            for _, number in self.client.key_value_dir_get("stop/"):
                stopping.ask(int(number))

    def _end(self, code: int, why: str) -> None:
        print(f"host {self.index}: {why}", file=sys.stderr, flush=True)
        os._exit(code)

    def _cause(self, code: int, why: str) -> tuple[int, str]:
        """Why a device program failed here: because another host ended or was lost, if one did; else as it is said."""
        before, ended = dict[str, str](), list[tuple[str, str]]()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            before = dict(self.client.key_value_dir_get("alive/"))
            time.sleep(3 * BEAT)
            ended = self.client.key_value_dir_get("ended/")
            after = dict(self.client.key_value_dir_get("alive/"))
        for key, said in ended:
            theirs, _, reason = said.partition(" ")
            return int(theirs), f"host {key.rsplit('/', 1)[1]} ended: {reason}"
        for key, said in before.items():
            host = int(key.rsplit("/", 1)[1])
            if host != self.index and after.get(key) == said:
                return LOST, f"host {host} is lost, the last thing it did: {said.partition(' ')[2]} ({why})"
        return code, why

    def part(self) -> None:
        self.meet("end")
        self.over.set()
        jax.distributed.shutdown()

    def leave(self, code: int, why: str, by_device: bool = False) -> NoReturn:
        """See `hosts.Hosts`. At once: the others may wait for this one inside a device program, for ever."""
        self.over.set()
        if by_device:
            code, why = self._cause(code, why)
        print(f"host {self.index}: {why}", file=sys.stderr)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, and with it everybody
            self.client.key_value_set(f"ended/{self.index}", f"{code} {why}"[:2000])
            if self.leader:
                time.sleep(2 * BEAT + 0.5)  # the service lives here: the others hear of it first
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def told_of(error: BaseException) -> str:
    """An error as the other hosts tell it."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]


def named(hosts: set[int]) -> str:
    """Hosts by their numbers, in a sentence."""
    return f"host{'s' if len(hosts) > 1 else ''} {', '.join(map(str, sorted(hosts)))}"


def slice_of_several() -> bool:
    """Whether this machine is one of several hosts of a TPU slice, by what its metadata or its JobSet tell JAX."""
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]  # it is there
    if (platforms or "").split(",")[0] not in ("", "tpu"):
        return False
    kinds = (cloud_tpu_cluster.GceTpuCluster, cloud_tpu_cluster.GkeTpuCluster)
    return any(kind.get_process_count() > 1 for kind in kinds if kind.is_env_present())


def joined(text: str) -> Hosts:
    """Joins the run that --hosts names, or that this TPU slice tells of; without either a run of this process alone.

    Signals of any host stop the run at the next `Pod.share`, where all of them leave together.

    Raises:
      ConfigError: `text` is not ADDRESS:PORT,COUNT,INDEX.
      HostsError: the others are not to be reached.
    """
    place = place_of(text)
    if place is None and not slice_of_several():
        return ONE_HOST
    here = threading.Event()
    where = f"{place.hosts - 1} other hosts, at {place.address}" if place else "the other hosts of this slice"

    def tell() -> None:
        while not here.wait(TOLD_EVERY):
            print(f"waiting for {where}", file=sys.stderr)

    threading.Thread(target=tell, daemon=True).start()
    # On a CPU each collective keeps a thread of XLA's pool waiting. A pool of as many threads as cores, the default,
    # runs dry where programs are in flight, and then waits for ever.
    os.environ.setdefault("NPROC", str(max(CPU_THREADS, os.cpu_count() or 1)))
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM, which `stopping` hears
    try:
        address, count, index = place or (None, None, None)
        jax.distributed.initialize(address, count, index, heartbeat_timeout_seconds=int(HEARTBEAT))
    except (RuntimeError, ValueError) as error:
        raise HostsError(f"cannot join {where}: {told_of(error)}") from error
    finally:
        here.set()
    stopping.tell_on()
    state = distributed.global_state
    return Pod(state.num_processes, state.process_id, state.client, print)
