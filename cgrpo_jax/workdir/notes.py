"""What a reader of a curve should know; TensorBoard and the report show it beside the name."""

NOTES = {
    "loss/total": (
        "With one update a rollout each ratio is 1, so the responses' part is minus the sum of their weighted "
        "advantages and says nothing of progress: it can be 0 while the gradient is not. Read rewards, evaluations and "
        "grad_norm."
    ),
    "policy/kl_clamped": "Share of tokens beyond objective.kl_limit, where the KL term has no gradient.",
    "policy/entropy": "Over the tokens that were trained on: those of problems with an advantage.",
}
