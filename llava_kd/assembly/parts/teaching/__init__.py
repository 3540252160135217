"""What is put around the teacher of a stage."""
