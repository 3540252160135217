"""Which record goes where, and `Batch`es on the device out of them."""
