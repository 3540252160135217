"""What tokens spell, and which of two tokenizers' tokens are the same."""
