"""How a run of training leaves that was asked to stop: what is saved, what is lost, and what is said of it."""

from __future__ import annotations

import contextlib
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cgrpo_jax import report
from cgrpo_jax.learning.update import TrainState
from cgrpo_jax.process.stopping import Stopped
from cgrpo_jax.run import resuming
from cgrpo_jax.run.build import Run
from cgrpo_jax.run.resuming import Past
from cgrpo_jax.workdir.checkpoints import Checkpointer

SECONDS = 60.0  # that a save may take
RATE = 100e6  # bytes a second of a slow disk


class Leaving:
    """Saves the last step that was done, writes the report and says so where the block ends by `Stopped`.

    The training loop keeps `step`, `state` and `problems_seen` of that step, and whether it is being evaluated.
    """

    def __init__(
        self,
        run: Run,
        past: Past,
        checkpointer: Checkpointer,
        state: TrainState,
        workdir: pathlib.Path,
        log: Callable[[str], None],
    ):
        self.run, self.past, self.checkpointer, self.workdir, self.log = run, past, checkpointer, workdir, log
        self.step, self.state, self.problems_seen, self.evaluating = past.step, state, past.problems_seen, False

    def __enter__(self) -> Leaving:
        return self

    def done(self, step: int, state: TrainState, problems_seen: int) -> None:
        """A step is trained and logged."""
        self.step, self.state, self.problems_seen = step, state, problems_seen

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """While it runs, the step is not evaluated yet."""
        self.evaluating = True
        yield
        self.evaluating = False

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: types.TracebackType | None) -> None:
        if kind is not Stopped:
            return
        said = self._left()
        if self.step:
            report.leave(self.workdir, self.log)
        raise Stopped(said) from None

    def _left(self) -> str:
        """Saves what can be saved; what became of the run, as a person would say it."""
        self.checkpointer.wait()
        saved = self.checkpointer.newest() or 0
        if self.step > saved and not (why := self._obstacle()):
            self.log(f"saving step {self.step}")
            meta = resuming.checkpoint_meta(self.run, self.past, self.step, self.problems_seen)
            self.checkpointer.save(self.step, self.state, meta)
            self.checkpointer.wait()
            saved = self.step
        if not self.step:
            return "stopped before the first step was done; the same command begins anew"
        on = f"the same command goes on after step {saved}" if saved else "the same command begins anew"
        if saved == self.step:
            return f"stopped after step {self.step}, which is saved; {on}"
        lost = f"step {self.step} is" if self.step == saved + 1 else f"steps {saved + 1} to {self.step} are"
        return f"stopped after step {self.step}; {lost} lost, for {why}; {on}"

    def _obstacle(self) -> str:
        """Why the state is not saved; "" where it is."""
        if self.evaluating and self.run.cfg.checkpoint.best:
            return "its evaluation, which checkpoint.best goes by, was not done"
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        return f"{size / 1e9:.0f} GB are not saved within a minute" if size > SECONDS * RATE else ""
