"""What a search tries next, and what it has tried."""
