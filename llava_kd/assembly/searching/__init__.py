"""A search run to its table; runs entered into the store; recipes recommended from it."""
