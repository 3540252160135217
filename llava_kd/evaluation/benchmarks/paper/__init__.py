"""The benchmarks of the paper's ten."""
