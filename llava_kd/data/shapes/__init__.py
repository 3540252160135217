"""The embedded data: generated pictures of shapes, captions and questions."""
