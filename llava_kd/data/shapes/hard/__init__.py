"""Hard shapes: free places, small sizes, labels to read, pairs that training never shows, other looks."""
