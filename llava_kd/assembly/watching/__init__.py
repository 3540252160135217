"""A run seen from its files alone, over ssh and without a package beyond Python's own."""
