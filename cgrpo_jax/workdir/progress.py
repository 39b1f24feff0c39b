"""The progress of a run on the terminal: the phase, the reward, tokens per second, time left."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterator, Mapping

import rich.console
import rich.progress
import rich.table

WINDOW = 50  # steps or answers whose pace gives the time left


def duration(seconds: float) -> str:
    """For people: 47 s, 12.5 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _columns(width: int) -> list[rich.progress.ProgressColumn]:
    """The columns that fit on a line of `width` characters. Nothing wraps; the note is shortened first."""
    fixed, free = rich.table.Column(no_wrap=True), rich.table.Column(no_wrap=True, ratio=1, overflow="ellipsis")
    plain = functools.partial(rich.progress.TextColumn, markup=False)  # users name tasks and metrics
    columns: list[rich.progress.ProgressColumn] = [
        plain("{task.description}", style="bold", table_column=fixed),
        plain("{task.completed:.0f}/{task.total:.0f}", table_column=fixed),
        plain("{task.fields[note]}", table_column=free),
    ]
    if width >= 50:
        columns.append(rich.progress.TimeElapsedColumn(table_column=fixed))
    if width >= 30:
        columns.append(plain("{task.fields[left]}", table_column=fixed))
    if width >= 110:
        columns.insert(1, rich.progress.BarColumn(bar_width=30))
    return columns


class Progress:
    """A live bar on a terminal, else one line per step; also measures the seconds of each phase of a step.

    Args:
      on_phase: is given the name of each phase as it begins, or goes on after an inner one.
    """

    def __init__(
        self, first_step: int, steps: int, unit: str = "step", on_phase: Callable[[str], None] = lambda name: None
    ):
        self.on_phase = on_phase
        self.first, self.steps, self.unit = first_step, steps, unit
        self.seconds: dict[str, float] = {}
        self.began = self.since = time.perf_counter()
        self.running: list[str] = []  # phases, the innermost last
        # When each step (or answer) was done, and its number; the first one compiles, so its duration is not counted.
        self.marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=WINDOW)
        terminal = sys.stderr.isatty()  # not forced by a variable that asks for colours in files
        self.console = rich.console.Console(
            file=sys.stderr, highlight=False, soft_wrap=True, force_terminal=terminal, emoji=False
        )
        self.live = terminal and not self.console.is_dumb_terminal
        columns = _columns(self.console.width)
        self.bar = rich.progress.Progress(*columns, console=self.console, disable=not self.live, expand=True)
        self.task = self.bar.add_task("start", total=steps, completed=first_step, note="", left="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *exc) -> None:
        self.bar.stop()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows the phase and adds its seconds to the step. The clock of an outer phase stops meanwhile."""
        self._credit()
        self.running.append(name)
        self._show(name)
        try:
            yield
        finally:
            self._credit()
            self.running.pop()
            self._show(self.running[-1] if self.running else name)

    def _show(self, name: str) -> None:
        self.bar.update(self.task, description=name)
        self.on_phase(name)

    def _credit(self) -> None:
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def resume_at(self, step: int) -> None:
        """Sets how many steps are done already, once that is known."""
        self.first = step
        self.bar.update(self.task, completed=step)

    def take_seconds(self) -> dict[str, float]:
        """Phase -> its seconds since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _left(self, done: int) -> str:
        """The time left after `done` steps, as text; "" until two of them were measured."""
        self.marks.append((time.perf_counter(), done))
        (then, first), (now, last) = self.marks[0], self.marks[-1]
        return f"left {duration((now - then) / (last - first) * (self.steps - done))}" if last > first else ""

    def step_done(self, step: int, notes: Mapping[str, float]) -> None:
        note, left = "  ".join(f"{name} {value:.4g}" for name, value in notes.items()), self._left(step)
        self.bar.update(self.task, completed=step, note=note, left=left)
        if not self.live:
            self.log(f"{self.unit} {step}/{self.steps}  {note}  {left}".rstrip())

    def expect(self, count: int) -> None:
        """Sets how many steps there are, once that is known."""
        self.steps = count
        self.bar.update(self.task, total=count)

    def answered(self) -> None:
        """Counts one answer of many; without a terminal, prints a line at each tenth of them."""
        self.first += 1
        left = self._left(self.first)
        self.bar.update(self.task, completed=self.first, left=left)
        if not self.live and self.first % max(1, self.steps // 10) == 0:
            passed = duration(time.perf_counter() - self.began)
            self.log(f"{self.unit} {self.first}/{self.steps}  {passed}  {left}".rstrip())

    def log(self, text: str) -> None:
        """Prints a line above the bar; markup, emoji names and control characters in it have no effect."""
        printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        self.console.print(printable, markup=False)


class Silence:
    """The progress of a host that is not the leader: shows and measures nothing. `on_phase` as of `Progress`."""

    def __init__(self, on_phase: Callable[[str], None] = lambda name: None):
        self.on_phase = on_phase

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        self.on_phase(name)
        return contextlib.nullcontext()

    def log(self, text: str) -> None:
        pass

    def resume_at(self, step: int) -> None:
        pass
