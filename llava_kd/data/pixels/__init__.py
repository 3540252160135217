"""Encoded image bytes to the pixels that a tower reads."""
