"""What a person sees while a run works: the phase, the reward, tokens per second, time left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping

import rich.console
import rich.progress


class Progress:
    """A live bar on a terminal, a line a step elsewhere; also the clock of the phases of a step."""

    def __init__(self, first_step: int, steps: int, unit: str = "step"):
        self.first, self.steps, self.unit = first_step, steps, unit
        self.seconds: dict[str, float] = {}
        self.began = self.since = time.perf_counter()
        self.running: list[str] = []  # phases, the innermost last
        self.console = rich.console.Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self.bar = rich.progress.Progress(
            rich.progress.TextColumn("[bold]{task.description:<9}"),
            rich.progress.BarColumn(bar_width=30),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeElapsedColumn(),
            rich.progress.TextColumn("left"),
            rich.progress.TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("start", total=steps, completed=first_step, note="")

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

    def step_done(self, step: int, notes: Mapping[str, float]) -> None:
        note = "  ".join(f"{name} {value:.4g}" for name, value in notes.items())
        self.bar.update(self.task, completed=step, note=note)
        if not self.console.is_terminal:
            left = (time.perf_counter() - self.began) / (step - self.first) * (self.steps - step)
            self.log(f"{self.unit} {step}/{self.steps}  {note}  left {left / 60:.1f} min")

    def expect(self, count: int) -> None:
        """There are `count` things to do (not known at first)."""
        self.steps = count
        self.bar.update(self.task, total=count)

    def answered(self) -> None:
        """One more of many small things is done; off a terminal, a line at each tenth."""
        self.first += 1
        self.bar.update(self.task, completed=self.first)
        if not self.console.is_terminal and self.first % max(1, self.steps // 10) == 0:
            self.log(f"{self.unit} {self.first}/{self.steps}  {time.perf_counter() - self.began:.0f} s")

    def log(self, text: str) -> None:
        """A line above the bar; markup and control characters in it mean nothing."""
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
