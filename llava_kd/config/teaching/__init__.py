"""Settings of how a teacher is asked."""
