"""The objects of a stage, each from its settings."""
