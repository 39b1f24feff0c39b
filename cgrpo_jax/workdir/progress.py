"""What a person sees while a run works: the phase, the reward, tokens per second, time left."""

from __future__ import annotations

import collections
import contextlib
import functools
import sys
import time
from collections.abc import Iterator, Mapping

import rich.console
import rich.progress
import rich.table

WINDOW = 50  # things that are done lately: by their pace the time that is left is told


def duration(seconds: float) -> str:
    """As a person would say it: 47 s, 12.5 min, 3.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _columns(width: int) -> list[rich.progress.ProgressColumn]:
    """What fits on a line of so many characters; nothing wraps, the note gives way first."""
    fixed, free = rich.table.Column(no_wrap=True), rich.table.Column(no_wrap=True, ratio=1, overflow="ellipsis")
    plain = functools.partial(rich.progress.TextColumn, markup=False)  # tasks and metrics have names of the user
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
    """A live bar on a terminal, a line a step elsewhere; also the clock of the phases of a step."""

    def __init__(self, first_step: int, steps: int, unit: str = "step"):
        self.first, self.steps, self.unit = first_step, steps, unit
        self.seconds: dict[str, float] = {}
        self.began = self.since = time.perf_counter()
        self.running: list[str] = []  # phases, the innermost last
        # When a step (an answer) was done; the first of a process compiles, and only begins the clock.
        self.marks: collections.deque[tuple[float, int]] = collections.deque(maxlen=WINDOW)
        terminal = sys.stderr.isatty()  # also where a variable asks for colours in files
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
        """Shows the phase and adds its seconds to the current step. A phase within another stops the outer clock."""
        self._credit()
        self.running.append(name)
        self.bar.update(self.task, description=name)
        try:
            yield
        finally:
            self._credit()
            self.running.pop()
            self.bar.update(self.task, description=self.running[-1] if self.running else name)

    def _credit(self) -> None:
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def resume_at(self, step: int) -> None:
        """So many steps were done before (not known at first)."""
        self.first = step
        self.bar.update(self.task, completed=step)

    def take_seconds(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self.seconds = self.seconds, {}
        return seconds

    def _left(self, done: int) -> str:
        """What to say of the time that is left now that so many are done; nothing before the second of a process."""
        self.marks.append((time.perf_counter(), done))
        (then, first), (now, last) = self.marks[0], self.marks[-1]
        return f"left {duration((now - then) / (last - first) * (self.steps - done))}" if last > first else ""

    def step_done(self, step: int, notes: Mapping[str, float]) -> None:
        note, left = "  ".join(f"{name} {value:.4g}" for name, value in notes.items()), self._left(step)
        self.bar.update(self.task, completed=step, note=note, left=left)
        if not self.live:
            self.log(f"{self.unit} {step}/{self.steps}  {note}  {left}".rstrip())

    def expect(self, count: int) -> None:
        """There are `count` things to do (not known at first)."""
        self.steps = count
        self.bar.update(self.task, total=count)

    def answered(self) -> None:
        """One more of many small things is done; off a terminal, a line at each tenth."""
        self.first += 1
        left = self._left(self.first)
        self.bar.update(self.task, completed=self.first, left=left)
        if not self.live and self.first % max(1, self.steps // 10) == 0:
            passed = duration(time.perf_counter() - self.began)
            self.log(f"{self.unit} {self.first}/{self.steps}  {passed}  {left}".rstrip())

    def log(self, text: str) -> None:
        """A line above the bar; markup, names of emojis and control characters in it mean nothing."""
        printable = "".join(c if c.isprintable() or c == "\n" else "?" for c in text)
        self.console.print(printable, markup=False)


class Silence:
    """The progress of a host that is not the leader: nothing is shown, and no clock is read."""

    def __enter__(self) -> Silence:
        return self

    def __exit__(self, *exc) -> None:
        pass

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def log(self, text: str) -> None:
        pass

    def resume_at(self, step: int) -> None:
        pass
