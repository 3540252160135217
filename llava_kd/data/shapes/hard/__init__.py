"""The hard setting: free places, small shapes, labels to read, pairs that training never shows, other looks."""
