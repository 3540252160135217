"""Models of other kinds than LLaVA, as teachers."""
