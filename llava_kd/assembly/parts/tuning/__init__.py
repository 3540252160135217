"""What a stage that tunes a teacher needs beside its models."""
