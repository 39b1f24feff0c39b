"""What a reader of a curve should know; TensorBoard and the report show it beside the name."""

NOTES = {
    "loss/total": (
        "With one update a rollout each ratio is 1, so the responses' part is minus the sum of their weighted "
        "advantages and says nothing of progress: it can be 0 while the gradient is not. Read rewards, evaluations and "
        "grad_norm."
    ),
    "policy/kl_clamped": "Share of tokens whose k3 is clamped (objective.kl_limit), where the KL term has no gradient.",
    "policy/entropy": (
        "Of the responses, over all tokens that were sampled, whatever has a loss: minus the mean of their "
        "log-probabilities in the distribution that they were drawn from, whose expectation the entropy is."
    ),
    "policy/entropy_refinements": "As policy/entropy, of the policy's refinements, under their own prompts.",
    "policy/entropy_trained": "Exact, over the tokens that were trained on: those of problems with an advantage.",
    "update/skipped": "Updates of the step in which no row had a loss: weights and moments stayed as they were.",
    "problems/undivided": (
        "Problems whose responses have all the same reward while a refinement has another: there is no deviation to "
        "divide by, and advantages are plain (objective.baseline=responses with objective.divide_by_std)."
    ),
}
