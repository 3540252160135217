"""Grids of runs, a memory of all runs, and what to try next."""
