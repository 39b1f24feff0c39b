"""The updates of a step: segments are packed into bins, put on the devices and learnt, one update after another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh

from cgrpo_jax.learning.packing import BinSize, Terms, pack_smallest
from cgrpo_jax.learning.telling import Update, heard
from cgrpo_jax.learning.update import Learner, TrainState, make_logps, make_update, put_bins
from cgrpo_jax.model.decoder import Params
from cgrpo_jax.model.sharding import joined
from cgrpo_jax.records import Completion, Name


class Updates:
    """The jitted programs of a run's updates, and what they need in every step. Every host calls them alike.

    Args:
      params: those that are trained, arrays or abstract ones.
      sizes: of the bins, the smallest first; each update takes the first that holds it.
      reference: all parameters of the reference of the KL term, where the loss has one.
    """

    def __init__(
        self,
        learner: Learner,
        mesh: Mesh,
        params: Params,
        sizes: Sequence[BinSize],
        terms: Terms,
        reference: Params | None = None,
    ):
        self.mesh, self.sizes, self.terms, self.reference = mesh, sizes, terms, reference
        self.update, self.logps = make_update(learner, mesh, params), make_logps(learner, mesh)

    def __call__(
        self, state: TrainState, frozen: Params, told: Sequence[Update], completions: Mapping[Name, Completion]
    ) -> tuple[TrainState, list[dict[str, float]]]:
        """One step. The state is donated.

        Args:
          frozen: the parameters that are not trained.
          told: what each update learns.
          completions: what this host sampled in the step.

        Returns:
          The state, and the metric sums of each update that was made. An update in which no row has a loss is left out:
          it would decay the weights and move Adam by old gradients.
        """
        packed = [pack_smallest(heard(update, completions), self.sizes, self.terms) for update in told]
        updates = [put_bins(self.mesh, bins) for bins in packed if bins.count]
        if len(packed) > 1:  # the trainer's own log-probabilities, before the first update
            params = joined(state.params, frozen)
            updates = [bins._replace(old_logp_ABT=self.logps(params, bins)) for bins in updates]
            del params
        if self.reference is not None:
            updates = [bins._replace(ref_logp_ABT=self.logps(self.reference, bins)) for bins in updates]
        sums_of_updates = []
        for bins in updates:
            state, sums = self.update(state, frozen, bins)
            sums_of_updates.append({name: float(value) for name, value in jax.device_get(sums).items()})
        return state, sums_of_updates
