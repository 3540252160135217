"""What a grid of runs is, which stages its arms share, and what of it has begun."""
