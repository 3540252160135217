"""What is compared inside two models rather than at their outputs: states, their information, early exits."""
