"""Checkpointing and fault tolerance for training large models on PyTorch."""
