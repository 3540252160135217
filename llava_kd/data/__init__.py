"""Records, templates, images and the loader: LLaVA-format files in, `Batch`es on the device out."""
