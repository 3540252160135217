"""Terms for two models with other tokenizers."""
