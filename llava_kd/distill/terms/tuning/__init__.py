"""Terms of a model that is tuned to teach: they read its labels, and no teacher."""
