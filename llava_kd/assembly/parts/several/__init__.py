"""Several teachers of one stage."""
