"""The checkpoints of a training run: restoring at the start, saving on the way, and leaving on a signal."""

from __future__ import annotations

import contextlib
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cgrpo_jax import report
from cgrpo_jax.learning.update import TrainState
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.process import stopping
from cgrpo_jax.process.hosts import Hosts
from cgrpo_jax.process.stopping import Stopped
from cgrpo_jax.run import resuming
from cgrpo_jax.run.build import Run
from cgrpo_jax.workdir.checkpoints import Checkpointer

SECONDS = 60.0  # that a save may take
RATE = 100e6  # bytes a second of a slow disk


class Saves:
    """What a run reads from and writes to `WORKDIR/checkpoints`. Use as a context manager.

    Where the block ends by `Stopped`, the last step that was done is saved, the report is written, and the message of
    the error says what became of the run. The training loop says of each step that it is `done`.

    Raises:
      CheckpointError, ConfigError: see `resuming.look_back`.
    """

    def __init__(self, run: Run, workdir: pathlib.Path, hosts: Hosts, log: Callable[[str], None]):
        self.run, self.workdir, self.log, self.hosts, self.leader = run, workdir, log, hosts, hosts.leader
        self.checkpointer = Checkpointer(workdir, run.cfg.checkpoint, log)
        try:
            self.past = hosts.share(lambda: resuming.look_back(run, self.checkpointer, log))
        except BaseException:
            self.checkpointer.__exit__(None, None, None)
            raise
        self.step, self.problems_seen, self.evaluating = self.past.step, self.past.problems_seen, False
        self.state: TrainState | None = None  # after `step`; None until it is restored

    def __enter__(self) -> Saves:
        return self

    def all_done(self) -> bool:
        """Whether nothing is left to do, because the last step is saved and evaluated; logs so."""
        last, step = self.run.cfg.train.steps, self.past.step
        if step < last or not self.past.evaluated:
            return False
        self.log(f"step {step} is done already; nothing to do for train.steps={last}")
        if self.leader:
            report.renew(self.workdir, self.log)
        return True

    def restore(self) -> tuple[TrainState, Params]:
        """The state to begin with, and the parameters that are not trained. See `resuming.initial_state`."""
        self.state, frozen, self.past = resuming.initial_state(self.run, self.checkpointer, self.past)
        return self.state, frozen

    def reference(self, frozen: Params) -> Params:
        """All parameters of the reference of the KL term. See `resuming.reference_params`."""
        return resuming.reference_params(self.run, frozen, self.past)

    def start_workdir(self) -> None:
        """See `resuming.start_workdir`; of the leader."""
        resuming.start_workdir(self.run, self.past, self.workdir, self.log)

    def done(self, step: int, state: TrainState, problems_seen: int) -> None:
        """Notes the state after a step that has been trained and logged, which is what a stop would save."""
        self.step, self.state, self.problems_seen = step, state, problems_seen

    def evaluation_due(self) -> bool:
        """Whether an evaluation follows the last step that was done."""
        return resuming.evaluation_due(self.run.cfg, self.step)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Marks the time of an evaluation, in which the step does not count as evaluated."""
        self.evaluating = True
        yield
        self.evaluating = False

    def save(self, evaluated: dict[str, float] | None = None) -> None:
        """Saves the last step that was done, in the background.

        Args:
          evaluated: metrics of its evaluation, where there was one.
        """
        assert self.state is not None
        meta = resuming.checkpoint_meta(self.run, self.past, self.step, self.problems_seen)
        self.checkpointer.save(self.step, self.state, meta, evaluated)

    def check(self) -> None:
        """Called before each step. Raises Stopped where a signal has come, CheckpointError where a save has failed.

        The leader decides for all hosts whether the last save has ended: what follows it (older checkpoints are
        deleted) is done by all of them together.
        """

        def ended() -> bool:
            stopping.look()
            return self.checkpointer.ended()

        if self.hosts.share(ended):
            self.checkpointer.wait()

    def finish(self) -> None:
        """Says where everything is, and writes the report."""
        self.log(
            f"done: step {self.step} is in {self.workdir}/checkpoints; metrics.jsonl, rollouts/, tensorboard/ beside it"
        )
        if self.leader:
            report.leave(self.workdir, self.log)
        self.log(f"export: python -m cgrpo_jax.convert --from={self.workdir} --to=hf --out={self.workdir}/model")

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises CheckpointError where it failed."""
        self.checkpointer.wait()

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: types.TracebackType | None) -> None:
        if kind is not Stopped or self.state is None:
            return self.checkpointer.__exit__(kind, error, trace)
        with self.checkpointer:
            said = self._left(self.state)
            if self.step and self.leader:
                report.leave(self.workdir, self.log)
            raise Stopped(said) from None

    def _left(self, state: TrainState) -> str:
        """Saves the last step where that is quick enough; returns a sentence on what was saved and what is lost."""
        self.checkpointer.wait()
        saved = self.checkpointer.newest() or 0
        if self.step > saved and not (why := self._obstacle(state)):
            self.log(f"saving step {self.step}")
            self.save()
            self.checkpointer.wait()
            saved = self.step
        if not self.step:
            return "stopped before the first step was done; the same command begins anew"
        on = f"the same command goes on after step {saved}" if saved else "the same command begins anew"
        if saved == self.step:
            return f"stopped after step {self.step}, which is saved; {on}"
        lost = f"step {self.step} is" if self.step == saved + 1 else f"steps {saved + 1} to {self.step} are"
        return f"stopped after step {self.step}; {lost} lost, for {why}; {on}"

    def _obstacle(self, state: TrainState) -> str:
        """Why the last step cannot be saved now; "" where it can."""
        if self.evaluating and self.run.cfg.checkpoint.best:
            return "its evaluation, which checkpoint.best goes by, was not done"
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        return f"{size / 1e9:.0f} GB are not saved within a minute" if size > SECONDS * RATE else ""
