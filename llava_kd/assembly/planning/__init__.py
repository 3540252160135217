"""What a run would do and need, told before it begins."""
