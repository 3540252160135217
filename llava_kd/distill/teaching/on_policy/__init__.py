"""Batches whose answers the student wrote itself."""
