"""Records to tokens: templates, label masks, and the two sides in step."""
