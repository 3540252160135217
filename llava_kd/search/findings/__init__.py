"""What a grid found: curves, statistics, tables and the page."""
