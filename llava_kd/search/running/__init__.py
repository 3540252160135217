"""What a grid has to do, in which order, and what it may cost."""
