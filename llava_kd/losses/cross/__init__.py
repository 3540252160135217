"""Two models whose tokenizers cut the same answer into other tokens."""
