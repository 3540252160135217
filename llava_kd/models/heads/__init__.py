"""What a model does to its logits around the head, and how a student goes without."""
