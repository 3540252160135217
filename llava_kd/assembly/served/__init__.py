"""A teacher that a server runs."""
