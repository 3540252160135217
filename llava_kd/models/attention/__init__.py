"""How a decoder attends: packed rows, what it shows, and whether it keeps records apart."""
