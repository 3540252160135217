"""Which recipes to begin with on data that are new, and on what evidence."""
