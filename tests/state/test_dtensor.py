"""DTensors become the boxes that torch really put on each rank: every element is compared with what torch holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from ckpt.state.dtensor import Lowered, local_tensor, lower, replicated, zeros_like
from ckpt_formats.errors import StateError
from ckpt_formats.geometry import Box, check_cover
from tests.ranks import run_ranks

NAMES = ("a", "b", "c")


@contextmanager
def mesh_as_seen_by(rank: int, sizes: Sequence[int], names: Sequence[str] | None = NAMES) -> Iterator[DeviceMesh]:
    """A mesh of that shape in a process group that does nothing, in which this process is that rank."""
    world = math.prod(sizes)
    distributed.init_process_group("fake", rank=rank, world_size=max(world, rank + 1), store=FakeStore())
    try:
        yield DeviceMesh(
            "cpu", torch.arange(world).reshape(*sizes), mesh_dim_names=tuple(names[: len(sizes)]) if names else None
        )
    finally:
        distributed.destroy_process_group()


def numbered(shape: Sequence[int]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def assembled(found: Lowered, local_shape: Sequence[int]) -> torch.Tensor:
    """The local tensor that the lowered boxes speak of; -1 where they say nothing."""
    full = numbered(found.shape)
    local = torch.full(tuple(local_shape), -1)
    for box, local_box in found.pieces:
        assert (local[local_box.slices()] == -1).all()
        local[local_box.slices()] = full[box.slices()]
    return local


def cover(shape: Sequence[int], boxes: set[Box]) -> None:
    check_cover(
        shape,
        np.array([box.offsets for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape)),
        np.array([box.sizes for box in boxes], dtype=np.int64).reshape(len(boxes), len(shape)),
    )


def from_local(local: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement], full: torch.Tensor) -> DTensor:
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


meshes = st.lists(st.integers(1, 4), min_size=1, max_size=3).filter(lambda sizes: math.prod(sizes) <= 12).map(tuple)


@st.composite
def cases(draw, strided=True):
    shape = draw(st.lists(st.integers(0, 13), max_size=3).filter(lambda shape: math.prod(shape) < 500).map(tuple))
    sizes = draw(meshes)
    kinds = ["replicate"] + (["shard", "shard"] + ["strided"] * strided if shape else [])
    placements = []
    for _ in sizes:
        kind = draw(st.sampled_from(kinds))
        dim = draw(st.integers(0, len(shape) - 1)) if shape else 0
        if kind == "replicate":
            placements.append(Replicate())
        elif kind == "shard":
            placements.append(Shard(dim))
        else:
            placements.append(_StridedShard(dim, split_factor=draw(st.integers(2, 5))))
    return shape, sizes, placements


@given(cases(strided=False))
def test_shards_and_replicas_hold_what_torch_distributes(case):
    shape, sizes, placements = case
    boxes = set()
    for rank in range(math.prod(sizes)):
        with mesh_as_seen_by(rank, sizes) as mesh:
            tensor = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
            found = lower(tensor)
            local = local_tensor(tensor)
            assert torch.equal(assembled(found, local.shape), local)
            assert found.shape == shape
            assert found.mesh == (NAMES[: len(sizes)], sizes)
            boxes.update(box for box, _ in found.pieces)
    cover(shape, boxes)


def nested(full: torch.Tensor, order, mesh: DeviceMesh) -> torch.Tensor:
    """What a rank holds when each dimension is cut by one mesh axis after the other in that order."""
    for dim, axes in order:
        for axis in axes:
            parts = list(full.chunk(mesh.size(axis), dim))
            parts += [full.narrow(dim, 0, 0)] * (mesh.size(axis) - len(parts))
            full = parts[mesh.get_local_rank(axis)]
    return full


@given(cases())
@example(((101,), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]))
@example(((7,), (3, 2), [_StridedShard(0, split_factor=2), Shard(0)]))
@example(((5,), (2,), [_StridedShard(0, split_factor=3)]))
def test_strided_shards_hold_what_torch_distributes(case):
    shape, sizes, placements = case
    for rank in range(math.prod(sizes)):
        with mesh_as_seen_by(rank, sizes) as mesh:
            tensor = distribute_tensor(numbered(shape), mesh, placements, src_data_rank=None)
            local = local_tensor(tensor)
            # where torch reads the placements as an order of cutting, and that gives the same shape, it is preferred
            order = DTensorSpec._maybe_convert_StridedShard_to_shard_order(tuple(placements), mesh)
            if order is not None and nested(numbered(shape), order, mesh).shape == local.shape:
                local = nested(numbered(shape), order, mesh)
            assert torch.equal(assembled(lower(tensor), local.shape), local)


@st.composite
def orders(draw):
    """Axes that cut the same dimension in any order, as FSDP2 over expert over tensor parallelism does."""
    shape = draw(st.lists(st.integers(0, 30), min_size=1, max_size=2).map(tuple))
    sizes = draw(meshes)
    dims = [draw(st.integers(0, len(shape) - 1)) for _ in sizes]
    axes = draw(st.permutations(range(len(sizes))))
    order = tuple((dim, tuple(axis for axis in axes if dims[axis] == dim)) for dim in range(len(shape)) if dim in dims)
    return shape, sizes, dims, order


@given(orders())
@example(((27,), (3, 4), [0, 0], ((0, (1, 0)),)))
@example(((5,), (2, 2, 2), [0, 0, 0], ((0, (1, 2, 0)),)))
def test_axes_that_cut_a_dimension_in_any_order_are_lowered_in_that_order(case):
    shape, sizes, dims, order = case
    full = numbered(shape)
    boxes = set()
    for rank in range(math.prod(sizes)):
        with mesh_as_seen_by(rank, sizes) as mesh:
            shards = tuple(Shard(dim) for dim in dims)
            placements = DTensorSpec._convert_shard_order_to_StridedShard(
                tuple(_entry(dim, axes) for dim, axes in order), shards, mesh
            )
            decoded = DTensorSpec._maybe_convert_StridedShard_to_shard_order(placements, mesh)
            assume(decoded is not None)
            local = nested(full, decoded, mesh)
            found = lower(from_local(local, mesh, placements, full))
            assert torch.equal(assembled(found, local.shape), local)
            boxes.update(box for box, _ in found.pieces)

            # the same, when torch keeps the order beside plain shards
            explicit = from_local(local, mesh, shards, full)
            explicit._spec.shard_order = tuple(_entry(dim, axes) for dim, axes in order)
            again = lower(explicit)
            assert torch.equal(assembled(again, local.shape), nested(full, order, mesh))
            assert again.cut == found.cut
    cover(shape, boxes)


def _entry(dim, axes):
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry

    return ShardOrderEntry(tensor_dim=dim, mesh_dims=axes)


def test_a_strided_shard_may_be_several_boxes():
    # torch 2.13's own helper takes these rows for offset 0, size 5
    with mesh_as_seen_by(0, (2,)) as mesh:
        tensor = distribute_tensor(numbered((8, 2)), mesh, [_StridedShard(0, split_factor=3)], src_data_rank=None)
        found = lower(tensor)
    assert [str(box) for box, _ in found.pieces] == ["[0:2,0:2]", "[3:5,0:2]", "[6:7,0:2]"]
    assert [str(box) for _, box in found.pieces] == ["[0:2,0:2]", "[2:4,0:2]", "[4:5,0:2]"]


@pytest.mark.parametrize(
    ("placements", "names", "cut"),
    [
        ([Shard(0), Replicate()], ("dp", "tp"), "S(0)@dp R@tp"),
        ([_StridedShard(0, split_factor=2), Shard(0)], ("dp", "tp"), "SS(0,2)@dp S(0)@tp"),
        ([Replicate(), Shard(1)], None, "R@0 S(1)@1"),
    ],
)
def test_the_cut_is_told_in_a_word_for_each_axis(placements, names, cut):
    with mesh_as_seen_by(1, (2, 2), names) as mesh:
        found = lower(distribute_tensor(numbered((4, 6)), mesh, placements, src_data_rank=None))
    assert found.cut == cut
    assert found.mesh == (names or ("0", "1"), (2, 2))


def test_partial_sums_are_refused_with_the_remedy():
    with mesh_as_seen_by(0, (2, 2)) as mesh:
        tensor = from_local(torch.zeros(4), mesh, [Replicate(), Partial()], torch.zeros(4))
        with pytest.raises(StateError, match=r"'grad\.w' is P\(sum\).*redistribute\(\)") as caught:
            lower(tensor, "grad.w")
    assert caught.value.tensor == "grad.w"


def test_shards_that_torch_took_for_even_are_refused():
    # ranks of 3 and 2 rows: without the global shape, from_local believes that every rank has as many as this one
    with mesh_as_seen_by(1, (2,)) as mesh:
        assert lower(from_local(torch.zeros(2, 4), mesh, [Shard(0)], torch.zeros(5, 4))).pieces
        wrong = from_local(torch.zeros(2, 4), mesh, [Shard(0)], torch.zeros(7, 4))
        with pytest.raises(StateError, match=r"'model\.w' has shape \[2, 4\], but S\(0\)@a gives this rank \[3, 4\]"):
            lower(wrong, "model.w")


def test_a_rank_outside_the_mesh_holds_nothing():
    with mesh_as_seen_by(3, (2,)) as mesh:
        found = lower(distribute_tensor(numbered((6,)), mesh, [Shard(0)], src_data_rank=None))
    assert (found.shape, found.pieces, found.cut) == ((6,), (), "S(0)@a")


def test_a_new_process_group_is_not_taken_for_the_old_one():
    # after a recovery the same process may have another rank in a mesh that compares equal
    kept = []
    for rank in range(4):
        with mesh_as_seen_by(rank, (4,)) as mesh:
            kept.append(distribute_tensor(numbered((8,)), mesh, [Shard(0)], src_data_rank=None))
            assert lower(kept[-1]).pieces[0][0] == Box((2 * rank,), (2,))


def test_new_slots_have_the_mesh_and_placements_of_their_parameter():
    with mesh_as_seen_by(1, (2, 2)) as mesh:
        placements = [_StridedShard(0, split_factor=2), Shard(0)]
        tensor = distribute_tensor(torch.ones(7, 3), mesh, placements, src_data_rank=None)
        slot = zeros_like(nn.Parameter(tensor), torch.bfloat16)
        assert lower(slot) == lower(tensor)
        assert (slot.dtype, slot.requires_grad, slot.placements) == (torch.bfloat16, False, tuple(placements))
        assert not local_tensor(slot).any()
        other = replicated(tensor, (2, 5), torch.float32)
        assert lower(other).pieces == ((Box.whole((2, 5)), Box.whole((2, 5))),)
        assert lower(other).cut == "R@a R@b"
        scalar = replicated(tensor, (), torch.float32)
        assert lower(scalar).pieces == ((Box.whole(()), Box.whole(())),)


# --- what FSDP2 and tensor parallelism really make, in real processes


class Odd(nn.Module):
    """Sizes that no mesh divides."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(5, size) for size in (101, 7, 3, 1)])
        self.down = nn.ModuleList([nn.Linear(size, 5) for size in (101, 7, 3, 1)])
        self.norm = nn.LayerNorm(5)

    def fill(self) -> dict[str, torch.Tensor]:
        whole = {}
        for name, parameter in self.named_parameters():
            whole[name] = numbered(parameter.shape).float()
            with torch.no_grad():
                parameter.copy_(whole[name])
        return whole


def _train_and_lower(rank, world_size, sizes, hybrid):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp_replicate", "dp") if hybrid else ("dp", "tp"))
    model = Odd()
    whole = model.fill()
    if hybrid:
        fully_shard(model, mesh=mesh)
    else:
        plan = {f"up.{k}": ColwiseParallel() for k in range(4)} | {f"down.{k}": RowwiseParallel() for k in range(4)}
        parallelize_module(model, mesh["tp"], plan)
        fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True)
    boxes = {}
    for name, parameter in model.named_parameters():
        found = lower(parameter, name)
        local = local_tensor(parameter)
        assert torch.equal(assembled(found, local.shape).float(), local), name
        assert found.shape == whole[name].shape
        boxes[name] = ([box for box, _ in found.pieces], found.cut)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert lower(optimizer.state[parameter]["exp_avg"]) == lower(parameter), name
    return boxes


@pytest.mark.parametrize(
    ("sizes", "hybrid"), [((2, 2), False), ((1, 4), False), ((4, 1), False), ((3, 2), False), ((2, 2), True)]
)
def test_what_fsdp2_and_tensor_parallelism_hold_is_lowered_on_every_rank(sizes, hybrid):
    per_rank = run_ranks(_train_and_lower, math.prod(sizes), sizes, hybrid)
    for name, parameter in Odd().named_parameters():
        cover(parameter.shape, {box for boxes in per_rank for box in boxes[name][0]})
    if (sizes, hybrid) == ((2, 2), False):
        assert [boxes["up.0.bias"] for boxes in per_rank] == [
            ([Box((start,), (stop - start,))], "SS(0,2)@dp S(0)@tp")
            for start, stop in ((0, 26), (51, 76), (26, 51), (76, 101))
        ]
        assert per_rank[0]["down.0.weight"][1] == "S(0)@dp S(1)@tp"
        assert per_rank[0]["norm.weight"][1] == "S(0)@dp"
    if hybrid:
        assert per_rank[0]["up.0.weight"][1] == "R@dp_replicate S(0)@dp"
