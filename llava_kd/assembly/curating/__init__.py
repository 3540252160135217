"""Data chosen and made by models: settings -> objects, a file a command."""
