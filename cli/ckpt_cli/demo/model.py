"""The demo's model, a small GPT, and how it is cut: tensor parallelism within, fully sharded data parallelism without.

Its sizes are chosen so that they do not divide: 341 rows of the feed-forward layers and as many rows of the vocabulary
as the text has different bytes. Knows nothing of checkpoints.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

WIDTH = 128
HEADS = 4
HIDDEN = 341
LAYERS = 2
# The tensor whose cut the demo shows: its rows divide by neither two nor four.
SHOWN_TENSOR = "blocks.0.mlp.up.weight"


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        # The rows of one head's query, key and value lie together, so that cutting the rows cuts between heads.
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(x).view(batch, length, -1, 3, WIDTH // HEADS).transpose(1, 2)
        query, key, value = heads.unbind(3)
        mixed = F.scaled_dot_product_attention(rotate(query, rotation), rotate(key, rotation), value, is_causal=True)
        out: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return out


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down: torch.Tensor = self.down(F.gelu(self.up(x)))
        return down


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.mlp_norm = nn.RMSNorm(WIDTH)
        self.mlp = FeedForward()

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), rotation)
        out: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class GPT(nn.Module):
    """A decoder-only transformer over `symbols` symbols."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(symbols, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, symbols, bias=False)

    def forward(self, numbers: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """With targets, the mean cross-entropy in nats per byte (0-d); else the logits [batch, length, symbols]."""
        rotation = rotation_angles(numbers.shape[1])
        x = self.embedding(numbers)
        for block in self.blocks:
            x = block(x, rotation)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rotation_angles(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of rotary position embeddings (RoFormer, arXiv:2104.09864), [length, half a head] each."""
    half = WIDTH // HEADS // 2
    angles = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(half) / half)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cosine, sine = rotation
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def parallelize(model: GPT, mesh: DeviceMesh) -> None:
    """Cut the model in place over a mesh with the axes `dp` and `tp`.

    Every rank must hold the same values: each keeps its own part and nothing is sent.
    """
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    for index in range(LAYERS):
        block = f"blocks.{index}"
        plan[f"{block}.attention.qkv"] = ColwiseParallel()
        plan[f"{block}.attention.out"] = RowwiseParallel()
        # A plain local tensor would not say that the two halves of 341 are 171 and 170 wide; a DTensor does.
        plan[f"{block}.mlp.up"] = ColwiseParallel(use_local_output=False)
        plan[f"{block}.mlp.down"] = RowwiseParallel()
    parallelize_module(model, mesh["tp"], plan, src_data_rank=None)
    # Gathered weights are kept from forward to backward: half the messages, and the model is small.
    for block_module in model.blocks:
        fully_shard(block_module, mesh=mesh["dp"], reshard_after_forward=False)
    fully_shard(model, mesh=mesh["dp"], reshard_after_forward=False)
