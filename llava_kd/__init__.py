"""Distil a large LLaVA-style multimodal model into a small one."""

__version__ = "0.1.0"
