"""Stepwise answers that a model writes, each step checked against evidence before anybody learns it."""
