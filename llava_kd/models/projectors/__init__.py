"""Projectors that are not a new one: taken over from a teacher, or reused."""
