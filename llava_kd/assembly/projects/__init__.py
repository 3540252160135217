"""A project of a user's own pictures, begun without a question; and what to tell of this machine."""
