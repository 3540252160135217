"""The directory of a run, where it comes from, and how it is stopped."""
