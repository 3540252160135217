"""Vision tower, projector and language model as one `MLLM`; stock checkpoints in and out."""
