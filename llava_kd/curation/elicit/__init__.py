"""Answers and questions that a model writes, as data with their origin."""
