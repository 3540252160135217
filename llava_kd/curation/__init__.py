"""What is done to data before a stage: which records are worth reading, and records that models write."""
