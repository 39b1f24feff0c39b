"""Writes and shows a step on the leader: metrics, rollouts, accuracies, and warnings on what went wrong in it."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cgrpo_jax.config import Config, fallback, public
from cgrpo_jax.config.options import drawn
from cgrpo_jax.data.told import for_others
from cgrpo_jax.learning import credit
from cgrpo_jax.records import Group
from cgrpo_jax.rollout.served import Server
from cgrpo_jax.sampling.pool import Stats
from cgrpo_jax.text.stop import going_on
from cgrpo_jax.text.tokenizer import Pieces
from cgrpo_jax.workdir.metrics import Writer, group_metrics, update_metrics
from cgrpo_jax.workdir.progress import Progress
from cgrpo_jax.workdir.tracking import open_tracker

OnRow = Callable[[dict[str, Any]], None]


@dataclasses.dataclass
class StepLog:
    """Reports steps to the files of the workdir, to the tracker and to the progress display."""

    cfg: Config
    progress: Progress
    pieces: Pieces
    server: Server | None  # of critique=api
    looked: bool = False  # at the texts of a rollout, whether they go on behind their answer
    writer: Writer | None = None  # once it is known where the run begins

    def open_files(self, workdir: pathlib.Path, step: int, on_row: OnRow | None = None) -> None:
        """Opens the files of the workdir and the tracker, to go on after `step`.

        Args:
          on_row: is given each line of metrics.jsonl.
        """
        cfg, log = self.cfg, self.progress.log
        tracker = open_tracker(cfg.train.tracker, workdir, for_others(public(cfg)), log)
        self.writer = Writer(workdir, step, log, on_row, tracker)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Writes and shows the accuracies of an evaluation with their 95 % intervals."""
        assert self.writer is not None
        cfg = self.cfg
        self.writer.scalars(step, values)
        for name in [name for name in values if name.endswith("/nonfinite")]:
            tokens, measured = f"{values[name]:.0f}", name.removesuffix("/nonfinite")
            self.progress.log(
                f"step {step}: {tokens} tokens of {measured} were sampled from numbers that are not finite; "
                "its accuracy means nothing"
            )
        for name in [name for name in values if f"{name}/low" in values]:
            low, high = values[f"{name}/low"], values[f"{name}/high"]
            how = drawn(cfg.eval.temperature, cfg.eval.top_p)
            self.progress.log(f"step {step}  {name} {values[name]:.3f}  [{low:.3f}, {high:.3f}]  {how}")

    def rollout_metrics(self, step: int, groups: Sequence[Group], stats: Stats) -> dict[str, float]:
        """The metrics of a rollout, and the seconds of each phase since the last call. Logs what went wrong in it."""
        seconds = self.progress.take_seconds()
        values = group_metrics(groups) | {f"seconds/{name}": value for name, value in seconds.items()}
        values |= {"sampler/slot_use": stats.slot_use, "tokens/prefilled": float(stats.prefilled)}
        values |= {"sampler/nonfinite": float(stats.nonfinite), "rollout/late": float(stats.late)}
        values |= {"tokens_per_s/sample": stats.tokens / seconds["sample"]}
        if self.cfg.train.replacements:
            values["problems/replaced"] = float(sum(not group.rows() for group in groups))
        if self.server is not None:
            values |= self._server_totals(step, self.server)
        attempts = (attempt for group in groups for attempt in (*group.responses, *group.refinements))
        if not self.looked and (found := going_on(attempt.text for attempt in attempts)):
            self.progress.log(f"step {step}: {found}")
        self.looked = True
        if stats.late:
            self.progress.log(
                f"step {step}: decoding did not wait for {stats.late} verdicts that took longer than a chunk; what was "
                "sampled after them followed a clock, so a run resumed before this step may differ in the last bits"
            )
        return values

    def step(
        self, step: int, groups: Sequence[Group] | None, sums: Sequence[dict[str, float]], stats: Stats | None
    ) -> None:
        """Writes and shows a finished step: its metrics, and its rollout, which method=sft does not have."""
        assert self.writer is not None
        if groups is None or stats is None:
            seconds = self.progress.take_seconds()
            values = update_metrics(sums) | {f"seconds/{name}": value for name, value in seconds.items()}
            self.writer.scalars(step, values)
            return self.progress.step_done(step, {"loss": values["loss/total"], "s": values["seconds/update"]})
        values = self.rollout_metrics(step, groups, stats) | update_metrics(sums)
        of, objective = self.cfg.train.updates_per_rollout, self.cfg.objective
        if skipped := of - len(sums):
            self.progress.log(
                f"step {step}: {skipped} of {of} updates trained nothing, for no row in them has a loss (no advantage, "
                "or cut and masked); weights and optimizer stayed as they were"
            )
        values["update/skipped"] = float(skipped)
        if objective.divide_by_std and objective.baseline == "responses":
            values["problems/undivided"] = float(sum(map(credit.undivided, groups)))
        if trained := sum(update["tokens"] for update in sums):
            values["tokens_per_s/update"] = trained / values["seconds/update"]
        self.writer.rollout(step, groups, self.pieces.widths)
        self.writer.scalars(step, values)
        if values.get("policy/kl_clamped"):
            self.progress.log(
                f"step {step}: {values['policy/kl_clamped']:.1%} of the tokens are so far from the reference that "
                "their KL term is clamped (objective.kl_limit) and has no gradient"
            )
        shown = {
            "reward": values["reward/responses"],
            "refined": values["refine/rate"],
            "fixed": values.get("refine/success", 0.0),
            "tok/s": values["tokens_per_s/sample"],
            "s": sum(value for name, value in values.items() if name.startswith("seconds/")),
        }
        self.progress.step_done(step, shown)

    def _server_totals(self, step: int, server: Server) -> dict[str, float]:
        """Counts of the requests of a step to the critic's server, and their price. Logs faults."""
        totals, cfg = server.take_totals(), self.cfg
        where = public(cfg)["api"]["base_url"]
        if totals.faults:
            self.progress.log(
                f"step {step}: {totals.faults} of {totals.requests} requests to {where} failed "
                f"({totals.last_fault}); refine.critique_fallback = {fallback(cfg)} stood in"
            )
        if totals.damaged:
            self.progress.log(f"step {step}: {totals.damaged} critiques on file were damaged and were asked for anew")
        if totals.guessed:
            self.progress.log(
                f"step {step}: {totals.guessed} replies of {where} report no number of tokens that can be; they count "
                "as the most that they can be, also for api.spend_cap"
            )
        return {
            "api/requests": float(totals.requests),
            "api/cached": float(totals.cached),
            "api/faults": float(totals.faults),
            "api/guessed": float(totals.guessed),
            "api/tokens": float(totals.tokens),
            "api/cost": totals.cost,
            "api/cost_total": server.spent,
        }
