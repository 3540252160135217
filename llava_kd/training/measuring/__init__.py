"""What is measured around a run's steps, outside the loop: operations per second, and traces."""
