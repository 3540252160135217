"""The report of a comparison run."""
