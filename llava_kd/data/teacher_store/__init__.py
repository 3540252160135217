"""A teacher's predictions on disk."""
