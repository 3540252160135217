"""Which rows of which prediction go to which loss, with which weight."""
