"""The loop, the schedule, the figures it logs, and its checkpoints."""
