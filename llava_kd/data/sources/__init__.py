"""Records and image bytes out of files of every layout: no pixel is decoded here."""
