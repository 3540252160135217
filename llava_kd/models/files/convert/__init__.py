"""Checkpoints of other layouts as stock LLaVA: `layouts` says what is read and what is refused."""
