"""Parameters that a framework cut by hand, in plain tensors: marked, trained, saved, and loaded into one process.

Fused query, key and value with grouped queries, fused gate and up, a padded vocabulary, and a flat partition as ZeRO
makes them. Compared bit for bit with one process.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

import ckpt
from ckpt.state import flatten
from ckpt_formats.errors import CoverageError, LayoutError, StateError
from ckpt_formats.layout import Cut, Layout, Mesh, Rule
from tests.loading.cuts import WIDTH, Run, _Shared, _Summed, rounded, weight
from tests.loading.test_every_cut import contents
from tests.ranks import run_ranks

QUERIES, KEYS, SIZE = 4, 2, 3
"""Heads of queries, heads of keys and of values, width of a head."""
GATE = 10
VOCABULARY, PADDED = 11, 16


class Fused(nn.Module):
    """A layer whose ranks each have some heads of all three parts, joined in one weight; ranks hold all else whole."""

    def __init__(self, parts: int = 1, part: int = 0) -> None:
        super().__init__()
        self.parts, self.part = parts, part
        widths = [QUERIES * SIZE, KEYS * SIZE, KEYS * SIZE]
        self.embed = nn.Parameter(torch.randn(VOCABULARY, WIDTH))
        self.qkv = nn.Parameter(torch.randn(sum(widths), WIDTH))
        self.gate_up = nn.Parameter(torch.randn(2 * GATE, WIDTH))
        self.out = nn.Parameter(torch.randn(WIDTH, QUERIES * SIZE))
        self.down = nn.Parameter(torch.randn(WIDTH, GATE))
        if parts > 1:
            self.cut(widths)

    def cut(self, widths: list[int]) -> None:
        for name, fused in (("qkv", widths), ("gate_up", [GATE, GATE])):
            whole = getattr(self, name)
            places, local, taken = [], 0, []
            for start, width in zip((0, *torch.tensor(fused).cumsum(0).tolist()), fused, strict=False):
                own = width // self.parts
                first = start + own * self.part
                places.append(((first, 0), (local, 0), (own, WIDTH)))
                taken.append(whole[first : first + own])
                local += own
            setattr(self, name, nn.Parameter(torch.cat(taken).detach()))
            ckpt.mark(self, name, whole.shape, parts=places)
        for name in ("out", "down"):
            whole = getattr(self, name)
            own = whole.shape[1] // self.parts
            setattr(self, name, nn.Parameter(whole[:, own * self.part : own * (self.part + 1)].detach().clone()))
            ckpt.mark(self, name, whole.shape, (0, own * self.part))
        rows = PADDED // self.parts
        first = rows * self.part
        held = max(0, min(rows, VOCABULARY - first))
        embed = torch.zeros(rows, WIDTH, dtype=self.embed.dtype)
        embed[:held] = self.embed[first : first + held].detach()
        whole, self.embed = self.embed, nn.Parameter(embed)
        ckpt.mark(self, "embed", whole.shape, parts=[((first, 0), (0, 0), (held, WIDTH))])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        first = self.part * self.embed.shape[0]
        here = (tokens >= first) & (tokens < first + self.embed.shape[0])
        x = functional.embedding((tokens - first).clamp(0, self.embed.shape[0] - 1), weight(self.embed))
        x = rounded(self.summed(x * here[..., None]))
        q, k, v = weight(self.qkv).split([n * SIZE // self.parts for n in (QUERIES, KEYS, KEYS)])
        shared = self.shared(x)
        grouped = rounded(shared @ k.t() + shared @ v.t()).unflatten(-1, (-1, SIZE)).repeat_interleave(2, dim=-2)
        heads = rounded(shared @ q.t()) + grouped.flatten(-2)
        x = rounded(x + self.summed(heads @ weight(self.out).t()) / 8)
        gate, up = (self.shared(x) @ weight(self.gate_up).t()).chunk(2, dim=-1)
        return rounded(x + self.summed(rounded(gate).relu() * (rounded(up) > 0) @ weight(self.down).t()) / 8)

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.parts == 1 else _Summed.apply(x, None)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.parts == 1 else _Shared.apply(x, None)


LAYOUT = Layout.parse("""
[otherwise]

[[rule]]
match = "embed"
pad = {dim = 0, to = 16}
cut = {axis = "tp", dim = 0, even = true}

[[rule]]
match = "qkv"
cut = {axis = "tp", dim = 0, parts = [12, 6, 6], even = true}

[[rule]]
match = "gate_up"
cut = {axis = "tp", dim = 0, parts = 2}

[[rule]]
match = ["out", "down"]
cut = {axis = "tp", dim = 1}
""")


class LaidOut(Fused):
    """The same, marked by a layout instead of tensor by tensor."""

    def cut(self, widths: list[int]) -> None:
        whole = Fused()
        super().cut(widths)
        del self.__dict__["_ckpt_marks"]
        ckpt.mark_layout(self, LAYOUT, Mesh.parse(f"tp={self.parts}"), whole.to("meta"))


def fused(seed: int, kind: type[Fused] = Fused) -> Run:
    torch.manual_seed(seed)
    parts = dist.get_world_size()
    torch.set_default_dtype(torch.float64)
    model = kind(parts, dist.get_rank() if parts > 1 else 0)
    torch.set_default_dtype(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0625)

    def step(number: int) -> None:
        tokens = torch.arange(8 * 4).reshape(8, 4) * (number + 3) % VOCABULARY
        (model(tokens).square().sum() / 64).backward()
        optimizer.step()
        optimizer.zero_grad()

    return Run(model, optimizer, step)


def partitioned(seed: int) -> Run:
    """ZeRO: all parameters in one flat buffer, of which each rank has an interval with its part of Adam's state."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    names, shapes = zip(*((name, tuple(p.shape)) for name, p in model.named_parameters()), strict=True)
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    parts, part = dist.get_world_size(), dist.get_rank()
    share = math.ceil(whole.numel() / parts)
    low, high = min(share * part, whole.numel()), min(share * (part + 1), whole.numel())
    weights: dict[str, Any] = {}
    owned, at = [], 0
    for name, shape in zip(names, shapes, strict=True):
        start, stop = (min(max(edge - at, 0), math.prod(shape)) for edge in (low, high))
        local = nn.Parameter(whole[at + start : at + stop].clone())
        weights[name] = ckpt.Shard.flat(local, shape, start)
        owned.append(local)
        at += math.prod(shape)
    optimizer = torch.optim.Adam(owned, lr=0.0625)

    def step(number: int) -> None:
        for local in owned:
            local.grad = torch.sin(local.detach() * (number + 1))
        optimizer.step()

    return Run(model, optimizer, step, {"model": weights, "optimizer": optimizer})


KINDS = {"fused": fused, "laid_out": partial(fused, kind=LaidOut), "partitioned": partitioned}


def save_on(rank: int, world: int, folder: str) -> None:
    for kind, make in KINDS.items():
        run = make(1)
        run.step(0)
        run.step(1)
        ckpt.save(run.state, f"{folder}/{kind}_{world}")
        run.step(2)
        ckpt.save(run.state, f"{folder}/{kind}_{world}_unbroken")


def load_on(rank: int, world: int, folder: str) -> None:
    for kind, make in KINDS.items():
        for source in (1, 2, 3):
            if kind != "partitioned" and source == 3:
                continue
            for ahead in (0, 1):
                run = make(2)
                for number in range(ahead):
                    run.step(number)
                ckpt.load(run.state, f"{folder}/{kind}_{source}")
                run.step(2)
                ckpt.save(run.state, f"{folder}/{kind}_{source}_{world}_{ahead}")


def save_on_three(rank: int, world: int, folder: str) -> None:
    run = partitioned(1)
    run.step(0)
    run.step(1)
    ckpt.save(run.state, f"{folder}/partitioned_3")


@pytest.mark.timeout(240)
def test_what_was_cut_by_hand_trains_saves_and_loads_as_one_process(tmp_path: Path) -> None:
    run_ranks(save_on, 1, str(tmp_path))
    run_ranks(save_on, 2, str(tmp_path))
    run_ranks(save_on_three, 3, str(tmp_path))
    for world in (1, 2):
        run_ranks(load_on, world, str(tmp_path))
    for kind, sources in (("fused", (1, 2)), ("laid_out", (1, 2)), ("partitioned", (1, 2, 3))):
        assert_same(tmp_path / f"{kind}_2", tmp_path / f"{kind}_1")
        for source in sources:
            assert_same(tmp_path / f"{kind}_{source}", tmp_path / f"{kind}_1")
            for world in (1, 2):
                for ahead in (0, 1):
                    assert_same(tmp_path / f"{kind}_{source}_{world}_{ahead}", tmp_path / f"{kind}_1_unbroken")


def assert_same(path: Path, truth: Path) -> None:
    found, expected = contents(path), contents(truth)
    assert found.keys() == expected.keys()
    differ = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not differ, f"{path.name}: {differ}"


def test_marks_that_do_not_fit_are_refused_with_the_remedy(tmp_path: Path) -> None:
    layer = nn.Linear(3, 4)
    with pytest.raises(StateError, match=r"does not lie within a tensor of shape \(6, 3\)"):
        ckpt.mark(layer, "weight", (6, 3), (4, 0))
    with pytest.raises(StateError, match="each element of it can be one of the whole only"):
        ckpt.mark(layer, "weight", (8, 3), parts=[((0, 0), (0, 0), (2, 3)), ((4, 0), (1, 0), (2, 3))])
    with pytest.raises(StateError, match="no parameter or buffer 'wait'"):
        ckpt.mark(layer, "wait", (8, 3), (0, 0))
    with pytest.raises(StateError, match="either offsets or parts"):
        ckpt.mark(layer, "weight", (8, 3))
    ckpt.mark(layer, "weight", (8, 3), (4, 0))
    layer.weight = nn.Parameter(torch.zeros(5, 3))
    with pytest.raises(StateError, match=r"'weight' was marked as a part of shape \[4, 3\].*mark it anew"):
        ckpt.save({"model": layer}, tmp_path / "a")
    with pytest.raises(StateError, match="no interval of a flattened tensor"):
        ckpt.Shard.flat(torch.zeros(5), (2, 4), 4)


def test_a_copy_of_a_marked_module_is_marked(tmp_path: Path) -> None:
    layer = nn.Linear(3, 2, bias=False)
    ckpt.mark(layer, "weight", (4, 3), (0, 0))
    average = torch.optim.swa_utils.AveragedModel(layer)
    with pytest.raises(CoverageError, match=r"average\.module\.weight.*no box covers"):
        ckpt.save({"average": average}, tmp_path / "a")


def test_a_layout_that_does_not_fit_the_module_is_refused_and_nothing_is_marked(tmp_path: Path) -> None:
    mesh = Mesh.parse("tp=2")
    whole = nn.ModuleDict({"q": nn.Linear(3, 4, bias=False), "norm": nn.LayerNorm(3)})
    here = nn.ModuleDict({"q": nn.Linear(3, 2, bias=False), "norm": nn.LayerNorm(3)})
    rows = Layout.parse('[otherwise]\n[[rule]]\nmatch = "q.weight"\ncut = {axis = "tp", dim = 0}')
    columns = Layout.parse('[otherwise]\n[[rule]]\nmatch = "q.weight"\ncut = {axis = "tp", dim = 1}')
    flat = '[otherwise]\n[[rule]]\nmatch = "q.*"\nflat = "all"\n[flat.all]\naxis = "tp"\nname = "all"'
    with pytest.raises(StateError, match=r"'q.weight' has the shape \[2, 3\], and by .* rank 1 has \[4, 1\] of it"):
        ckpt.mark_layout(here, columns, mesh, whole, rank=1)
    with pytest.raises(StateError, match=r"has a tensor 'module.q.weight' of whose whole nothing is said"):
        ckpt.mark_layout(nn.ModuleDict({"module": here}), rows, mesh, whole, rank=0)
    with pytest.raises(StateError, match=r"'norm.weight', and the module has not"):
        ckpt.mark_layout(nn.ModuleDict({"q": here["q"]}), rows, mesh, whole, rank=0)
    with pytest.raises(LayoutError, match="no tensor of the checkpoint matches"):
        ckpt.mark_layout(here, Layout.parse('[otherwise]\n[[rule]]\nmatch = "k.*"'), mesh, whole, rank=0)
    with pytest.raises(StateError, match="rank 0 has none of that name"):
        ckpt.mark_layout(here, Layout.parse(flat), mesh, whole, rank=0)
    ckpt.save({"model": here}, tmp_path / "a")  # unmarked: whole
    ckpt.mark_layout(here, rows, mesh, whole, rank=1)
    with pytest.raises(CoverageError, match=r"model\.q\.weight.*no box covers"):
        ckpt.save({"model": here}, tmp_path / "b")


@pytest.mark.parametrize(
    "cut",
    [
        'cut = {axis = "tp", dim = 0, parts = [16, 4, 4], groups = 4, even = true}',
        'cut = {axis = "tp", dim = 1, lists = [[5, 0, 1], [2, 4, 3]]}',
        'cut = [{axis = "tp", dim = 0, parts = 2}, {axis = "dp", dim = 1}]',
        'pad = {dim = 0, multiple = 16, per = "tp"}\ncut = [{axis = "tp", dim = 0}, {axis = "dp", dim = 0}]',
    ],
)
def test_each_element_of_a_marked_tensor_is_that_of_the_whole(cut: str) -> None:
    mesh = Mesh.parse("dp=2,tp=2")
    whole = torch.arange(24.0 * 6).reshape(24, 6)
    layout = Layout.parse(f'[[rule]]\nmatch = "qkv"\n{cut}')
    resolved = layout.resolve(mesh, {"qkv": (24, 6)})
    for rank in range(mesh.size):
        held = resolved.local(rank)["qkv"]
        memory = np.full(held.shape, np.nan, np.float32)
        for piece in held.pieces:
            piece.view(memory)[...] = whole[piece.box.slices()].numpy()
        module = nn.ParameterDict({"qkv": torch.from_numpy(memory)})
        ckpt.mark_layout(module, layout, mesh, {"qkv": whole.shape}, rank=rank)
        local = flatten({"model": module}).tensors["model.qkv"]
        assert local.shape == (24, 6)
        assert sum(piece.box.numel for piece in local.pieces) == np.isfinite(memory).sum()
        assert all(torch.equal(piece.view, whole[piece.box.slices()]) for piece in local.pieces)


def test_one_tensor_on_the_ranks_out_of_several_can_not_be_marked() -> None:
    whole = {"q": (4, 3), "k": (4, 3)}
    joined = Layout.parse('[[rule]]\nmatch = ["q", "k"]\njoin = 0\nlocal = "q"')
    with pytest.raises(LayoutError, match="can't be marked"):
        ckpt.mark_layout(nn.ParameterDict({"q": torch.zeros(8, 3)}), joined, Mesh.parse("tp=1"), whole, rank=0)


TIED = Layout.parse("""
[[rule]]
match = "embed.weight"
on = {pp = [0]}
pad = {dim = 0, to = 16}
cut = {axis = "tp", dim = 0}

[[rule]]
match = "head.weight"
tied = "embed.weight"
on = {pp = [-1]}
pad = {dim = 0, to = 16}
cut = {axis = "tp", dim = 0}
""")


def tied_model(rows: int) -> nn.ModuleDict:
    torch.manual_seed(5)
    model = nn.ModuleDict({"embed": nn.Embedding(rows, 3), "head": nn.Linear(3, rows, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def save_tied(rank: int, world: int, path: str) -> None:
    model, rows = tied_model(8), tied_model(11)["embed"].weight
    with torch.no_grad():
        model["embed"].weight[: 11 - 8 * rank] = rows[8 * rank : 8 * rank + 8]
    ckpt.mark_layout(model, TIED, Mesh.parse("pp=1,tp=2"), tied_model(11))
    ckpt.save({"model": model}, path)
    again = tied_model(8)
    ckpt.mark_layout(again, TIED, Mesh.parse("pp=1,tp=2"), {"embed.weight": (11, 3)})
    nn.init.zeros_(again["head"].weight)
    ckpt.load({"model": again}, path)
    assert torch.equal(again["embed"].weight[: 11 - 8 * rank], rows[8 * rank : 8 * rank + 8])


def test_what_a_layout_ties_is_marked_under_each_of_its_names(tmp_path: Path) -> None:
    run_ranks(save_tied, 2, str(tmp_path / "a"))
    with ckpt.open(tmp_path / "a") as checkpoint:
        assert checkpoint.manifest.aliases == {"model.head.weight": "model.embed.weight"}
        assert torch.equal(checkpoint["model.head.weight"][:], tied_model(11)["embed"].weight)
    # on the last stage of a pipeline there is only the other name
    head = nn.ModuleDict({"head": nn.Linear(3, 8, bias=False)})
    ckpt.mark_layout(head, TIED, Mesh.parse("pp=2,tp=2"), tied_model(11), rank=3)
    local = flatten({"model": head}).tensors["model.head.weight"]
    assert (local.shape, [str(piece.box) for piece in local.pieces]) == ((11, 3), ["[8:11,0:3]"])


def test_a_tie_that_the_module_has_not_and_one_that_is_cut_in_two_ways_are_refused_with_both_names() -> None:
    mesh = Mesh.parse("pp=1,tp=2")
    apart = nn.ModuleDict({"embed": nn.Embedding(8, 3), "head": nn.Linear(3, 8, bias=False)})
    with pytest.raises(StateError, match=r"'head.weight' and 'embed.weight' are one tensor, and in the module .* two"):
        ckpt.mark_layout(apart, TIED, mesh, tied_model(11), rank=0)
    crossed = Layout(
        rules=[TIED.rules[0], Rule(match="head.weight", tied="embed.weight", cut=Cut(axis="tp", dim=0, sizes=[3, 8]))]
    )
    with pytest.raises(LayoutError, match=r"(?s)'head.weight' and 'embed.weight' are one tensor.*give both the same"):
        ckpt.mark_layout(tied_model(8), crossed, mesh, tied_model(11), rank=1)
