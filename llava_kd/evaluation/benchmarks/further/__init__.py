"""Benchmarks beside the ten of the paper; each is a line in `FURTHER` of the catalogue."""
