"""Stock directories in and out, and other layouts converted."""
