"""Critique-GRPO on JAX: reinforcement learning of language models from rewards and critiques."""
