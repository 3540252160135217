"""One question about one picture to several models at once, and a page for it."""
