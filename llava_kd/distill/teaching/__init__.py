"""Who teaches, and what a step asks of it."""
