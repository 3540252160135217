"""Changes of a batch's pictures before both models see them: one protocol, and those that there are."""
