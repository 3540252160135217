"""Grids of runs: what differs, what is shared, what came out."""
