"""Distil a large LLaVA-style multimodal model into a small one."""

from llava_kd import moved

__version__ = "0.1.0"

moved.install()
