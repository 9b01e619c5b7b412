"""What the server that benchmark processes are forked from imports before the first of them; holds no code."""

import safetensors.torch
import torch
import torch.distributed.checkpoint
import torch.distributed.tensor

import ckpt.api

__all__ = ["ckpt", "safetensors", "torch"]
