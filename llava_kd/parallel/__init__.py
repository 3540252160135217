"""The one door to PyTorch's and DeepSpeed's training engines."""
