"""What a teacher says of a row, changed before it is compared."""
