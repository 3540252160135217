"""The store of experience: what every run was, what it cost and how it ended."""
