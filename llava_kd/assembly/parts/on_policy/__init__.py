"""The student as it is answers the records of a step before the step."""
