"""A teacher whose tokenizer is not the student's."""
