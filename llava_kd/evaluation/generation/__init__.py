"""Questions in, answers of a stock LLaVA out."""
