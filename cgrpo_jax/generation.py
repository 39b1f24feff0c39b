"""Requests of any number and length -> calls of the compiled sampler at few shapes -> completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from cgrpo_jax import sharding
from cgrpo_jax.batch import ladder
from cgrpo_jax.model import ModelConfig, Params
from cgrpo_jax.sampler import SamplingConfig, row_keys, sample
from cgrpo_jax.types import Completion, Generate, Request


@dataclasses.dataclass(frozen=True)
class Generator:
    """What stays the same over a run: model, end-of-sequence ids, seed, and the largest number of rows at once."""

    model: ModelConfig
    mesh: Mesh
    eos_ids: tuple[int, ...]
    seed: int
    max_rows: int
    dtype: DTypeLike

    def bind(self, params: Params, step: int, sampling: SamplingConfig) -> Generate:
        """The function (requests -> completions) of these parameters at this step."""

        def generate(requests: Sequence[Request]) -> list[Completion]:
            done: list[Completion] = []
            for part in self._parts(requests):
                done += self._run(params, step, sampling, part)
            return done

        return generate

    def _parts(self, requests: Sequence[Request]) -> Iterator[Sequence[Request]]:
        for first in range(0, len(requests), self.max_rows):
            yield requests[first : first + self.max_rows]

    def _step_down(self, count: int) -> int:
        """Row counts are halved from `max_rows`: few shapes serve any number of requests."""
        rows, least = self.max_rows, self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        while rows % (2 * least) == 0 and count <= rows // 2:
            rows //= 2
        return rows

    def _run(self, params: Params, step: int, sampling: SamplingConfig, part: Sequence[Request]) -> list[Completion]:
        prompts = list(dict.fromkeys(tuple(request.prompt_ids) for request in part))
        place = {ids: q for q, ids in enumerate(prompts)}
        rows, slots = self._step_down(len(part)), ladder(max(map(len, prompts)))
        prompt_QT = np.zeros((self._step_down(len(prompts)), slots), np.int32)
        start_Q = np.full(len(prompt_QT), slots - 1, np.int32)
        for q, ids in enumerate(prompts):
            start_Q[q] = slots - len(ids)
            prompt_QT[q, start_Q[q] :] = ids
        name_B3, prompt_of_B = np.zeros((rows, 3), np.int32), np.zeros(rows, np.int32)
        for row, request in enumerate(part):
            name_B3[row] = request.kind, request.problem, request.sample
            prompt_of_B[row] = place[tuple(request.prompt_ids)]
        inputs = (prompt_QT, start_Q, prompt_of_B, np.arange(rows) < len(part), name_B3)
        prompt_QT, start_Q, prompt_of_B, wanted_B, name_B3 = sharding.put_rows(self.mesh, inputs)
        samples = sample(
            params,
            prompt_QT,
            start_Q,
            prompt_of_B,
            wanted_B,
            row_keys(jnp.uint32(self.seed), jnp.int32(step), name_B3),
            np.asarray(self.eos_ids, np.int32),
            cfg=self.model,
            sampling=sampling,
            dtype=self.dtype,
        )
        tokens_BT, logp_BT, length_B, finished_B = jax.device_get(samples)
        return [
            Completion(tokens_BT[row, :length], logp_BT[row, :length], bool(finished_B[row]))
            for row, length in enumerate(length_B[: len(part)])
        ]
