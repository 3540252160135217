"""Answer generation, scoring, and the report."""
