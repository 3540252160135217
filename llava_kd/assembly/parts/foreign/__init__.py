"""Teachers of other kinds than LLaVA, as the settings ask for them."""
