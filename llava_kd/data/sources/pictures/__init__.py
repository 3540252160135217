"""Paths of images: as files of records write them, missing, or given where none is read."""
