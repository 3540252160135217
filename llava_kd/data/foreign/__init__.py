"""How models of other kinds than LLaVA read records: by their own processors."""
