"""Two successors that are not built: a segment can say what SDPO and Guide train on, in float64.

SDPO (arXiv 2601.20802) matches the student on its own response to a teacher, the same policy under more context. Whatever
its divergence, the gradient at the current policy is that of sum c log s with plain numbers c, a segment's `ce_T`. Of the
sampled token alone that is the response's own segment. Of the k likeliest tokens of a place it is k segments of one token
behind the same prefix: exact, and dear, for each place would be a prompt of its own. Building it asks for several targets
a place in the bins and in the head, and for nothing else.

Guide (arXiv 2506.13923) is `refined_shape=ratio_to_sampler`, the prompt with a hint in place of the refinement prompt.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cgrpo_jax.config.options import ObjectiveConfig
from cgrpo_jax.learning.objective import Tokens, token_loss
from cgrpo_jax.learning.packing import Terms, bin_size, pack
from cgrpo_jax.records import Segment

PROMPT, RESPONSE, VOCABULARY, K = [7, 8], [3, 0, 4, 1], 6, 3


@pytest.fixture
def policies(rng):
    """Logits of the student at each place of the response, which are trained, and the teacher's log-probabilities."""
    T = len(RESPONSE)
    teacher_TV = rng.normal(size=(T, VOCABULARY))
    return rng.normal(size=(T, VOCABULARY)), teacher_TV - np.log(np.exp(teacher_TV).sum(-1, keepdims=True))


def log_softmax(z_TV):
    return z_TV - np.log(np.exp(z_TV).sum(-1, keepdims=True))


def segment(prompt_ids, ids, ce_T):
    zero_T = np.zeros(len(ids))
    return Segment(prompt_ids, np.asarray(ids, np.int32), False, zero_T, np.asarray(ce_T), zero_T, zero_T)


def slope_of(segments, z_TV):
    """Gradient of the segments' loss by the student's logits: the model is a table of what follows each prefix."""
    place = {tuple(PROMPT + RESPONSE[:t]): t for t in range(len(RESPONSE))}
    rows = [[*s.prompt_ids, *s.ids] for s in segments]
    begins = [len(s.prompt_ids) for s in segments]
    where = [[place[tuple(row[:n])] for n in range(b, len(row))] for b, row in zip(begins, rows, strict=True)]
    with jax.enable_x64(True):

        def loss(z_TV):
            logp_TV, total = jax.nn.log_softmax(z_TV), 0.0
            for s, places in zip(segments, where, strict=True):
                logp_BT = logp_TV[np.array(places), s.ids][None]
                tokens = Tokens(
                    scored_BT=jnp.ones(logp_BT.shape, bool),
                    refined_BT=jnp.zeros(logp_BT.shape, bool),
                    pg_BT=jnp.asarray(s.pg_T)[None],
                    ce_BT=jnp.asarray(s.ce_T)[None],
                )
                total += token_loss(logp_BT, 0 * logp_BT, tokens, ObjectiveConfig())[0]
            return total

        return np.asarray(jax.grad(loss)(jnp.asarray(z_TV)))


def differences(value, z_TV):
    """Central differences of a function of the logits."""
    slope_TV = np.zeros_like(z_TV)
    for index in np.ndindex(z_TV.shape):
        ends = []
        for move in (1e-6, -1e-6):
            moved_TV = z_TV.copy()
            moved_TV[index] += move
            ends.append(value(moved_TV))
        slope_TV[index] = (ends[0] - ends[1]) / 2e-6
    return slope_TV


def test_sdpo_of_the_sampled_token(policies):
    """Per token sg(log s - log t) log s, averaged over the response."""
    z_TV, teacher_TV = policies
    T, chosen = len(RESPONSE), (np.arange(len(RESPONSE)), RESPONSE)
    gap_T = log_softmax(z_TV)[chosen] - teacher_TV[chosen]
    slope_TV = slope_of([segment(PROMPT, RESPONSE, -gap_T / T)], z_TV)
    one_TV = np.eye(VOCABULARY)[RESPONSE]
    by_hand_TV = gap_T[:, None] * (one_TV - np.exp(log_softmax(z_TV))) / T
    np.testing.assert_allclose(slope_TV, by_hand_TV, rtol=1e-12)
    np.testing.assert_allclose(
        slope_TV, differences(lambda z: (gap_T * log_softmax(z)[chosen]).mean(), z_TV), atol=1e-9
    )


def test_sdpo_of_the_likeliest_tokens_and_a_tail(policies):
    """Reverse divergence over the student's k likeliest tokens and one bucket for the rest, averaged over places."""
    z_TV, teacher_TV = policies
    top_TK = np.argsort(-z_TV, axis=-1)[:, :K]

    def buckets(logp_TV):
        top = np.take_along_axis(logp_TV, top_TK, -1)
        return top, np.log1p(-np.exp(top).sum(-1))

    (teacher_TK, teacher_tail_T), (student_TK, tail_T) = buckets(teacher_TV), buckets(log_softmax(z_TV))

    def divergence(z_TV):
        s_TK, s_tail_T = buckets(log_softmax(z_TV))
        kept = (np.exp(s_TK) * (s_TK - teacher_TK)).sum(-1)
        return (kept + np.exp(s_tail_T) * (s_tail_T - teacher_tail_T)).mean()

    # d divergence / d log s_v = s_v (log s_v/t_v - log s_tail/t_tail)
    share_TK = np.exp(student_TK) * (student_TK - teacher_TK - (tail_T - teacher_tail_T)[:, None]) / len(RESPONSE)
    made = [
        segment(PROMPT + RESPONSE[:t], [top_TK[t, k]], [-share_TK[t, k]])
        for t in range(len(RESPONSE))
        for k in range(K)
    ]
    np.testing.assert_allclose(slope_of(made, z_TV), differences(divergence, z_TV), atol=1e-9)
    size = bin_size(
        share=True, problems=len(RESPONSE), group=K, at_once=1, row_devices=1, longest_prompt=5, longest_ids=1
    )
    bins = pack(made, size, Terms(ce=True))
    np.testing.assert_allclose(np.sort(bins.ce_ABT[bins.scored_ABT]), np.sort(-share_TK.ravel()), rtol=1e-6)


def test_guide_weighs_by_the_hinted_prompt():
    """p(o|q) 0.1 and 0.6, sampled at 0.5 and 0.4 under the hint: ratios 0.2 and 1.5; A = 7/8, and -1/8."""
    with jax.enable_x64(True):
        logp_BT, sampler_BT = jnp.log(jnp.array([[0.1, 0.6]])), jnp.log(jnp.array([[0.5, 0.4]]))
        yes_BT = jnp.ones((1, 2), bool)
        for adv, clip, slope in (
            (7 / 8, False, [-7 / 40, -21 / 16]), (-1 / 8, False, [1 / 40, 3 / 16]),
            (7 / 8, True, [-7 / 40, 0.0]), (-1 / 8, True, [0.0, 3 / 16]),
        ):  # fmt: skip
            cfg = ObjectiveConfig(refined_shape="ratio_to_sampler", clip_refinements=clip)
            tokens = Tokens(yes_BT, yes_BT, jnp.full((1, 2), adv), sampler_logp_BT=sampler_BT)
            found = jax.grad(lambda x, tokens=tokens, cfg=cfg: token_loss(x, 0 * x, tokens, cfg)[0])(logp_BT)
            np.testing.assert_allclose(found, [slope], rtol=1e-12, atol=1e-15)
