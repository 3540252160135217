"""Requests to a server that runs a model: what is asked, with what patience, and whether the answer fits."""
