"""Any layout to any layout in larger number: every rank's description, plan, files and reads, without processes."""

from __future__ import annotations

import itertools
import secrets
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt.saving.commit import Contents, FileNames, Part, commit
from ckpt.saving.plan import decode_assignment, describe, encode_assignment, make_plan
from ckpt.saving.save import chunks_of
from ckpt.state import LocalState, LocalTensor, Piece
from ckpt.storage.data_file import Staging, write_data_file
from ckpt.storage.files import Files
from ckpt.storage.publish import prepare_folder
from ckpt_formats.checkpoint import open_checkpoint
from ckpt_formats.geometry import Box, flat_boxes
from ckpt_formats.layout import Cuts, Mesh, boxes
from ckpt_formats.native.names import data_path
from ckpt_formats.reading import Request

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.float64]
STAGING = Staging(count=2, size=1 << 16)


@st.composite
def layouts(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> list[list[list[Box]]]:
    """Boxes by rank and tensor: cut over a mesh of up to three axes, or flat as ZeRO does."""
    if draw(st.booleans()):
        world = draw(st.integers(1, 6))
        return [[flat(shape, world, rank) for shape in shapes] for rank in range(world)]
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    mesh = Mesh(tuple(f"axis{k}" for k in range(len(sizes))), tuple(sizes))
    cuts: list[Cuts] = []
    for shape in shapes:
        options = [None, *range(len(shape))]
        cuts.append(tuple(draw(st.sampled_from(options)) for _ in sizes))
    return [
        [boxes(shape, cut, mesh, rank) for shape, cut in zip(shapes, cuts, strict=True)] for rank in range(mesh.size)
    ]


def flat(shape: tuple[int, ...], world: int, rank: int) -> list[Box]:
    numel = Box.whole(shape).numel
    step = -(-numel // world)
    return flat_boxes(shape, min(rank * step, numel), min((rank + 1) * step, numel)) if numel else []


shapes_of_tensors = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=4)


def state_of(rank_boxes: list[list[Box]], wholes: list[torch.Tensor]) -> LocalState:
    tensors = {}
    for k, (held, whole) in enumerate(zip(rank_boxes, wholes, strict=True)):
        pieces = [Piece(box, whole[box.slices()].clone() if box.sizes else whole.clone()) for box in held]
        tensors[f"t{k}"] = LocalTensor(f"t{k}", whole.dtype, tuple(whole.shape), pieces)
    return LocalState(tensors=tensors)


def write(states: list[LocalState], path: str) -> None:
    """What the ranks do, one after the other."""
    files, attempt = Files(), secrets.token_hex(8)
    plan = make_plan([describe(state) for state in states])
    folder = prepare_folder(files, path)
    parts = []
    for rank, (state, assignment) in enumerate(zip(states, plan.assignments, strict=True)):
        chunks = chunks_of(state, decode_assignment(encode_assignment(assignment)))
        written = write_data_file(files, path, data_path(rank, 0, attempt), chunks, STAGING)
        parts.append(Part.decode(Part([written], [FileNames.of([chunk.name for chunk in chunks])]).encode()))
    contents = Contents(
        step=1,
        tensors=plan.tensors,
        aliases={},
        values={},
        entries={},
        layout={"world_size": len(states), "meshes": plan.meshes, "cuts": plan.cuts},
        provenance={},
    )
    commit(files, folder, attempt, contents, parts)


def as_bytes(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """[*shape, itemsize], uint8."""
    size = tensor.element_size()
    flat_bytes = np.frombuffer(bytes(tensor.contiguous().untyped_storage()), np.uint8)
    return flat_bytes[: tensor.numel() * size].reshape(*tensor.shape, size)


@pytest.mark.parametrize("seed", [0, 1])
@given(data=st.data(), shapes=shapes_of_tensors)
@settings(max_examples=75, deadline=None)
def test_what_one_layout_wrote_another_reads(seed: int, data: st.DataObject, shapes: list[tuple[int, ...]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    wholes = []
    for k, shape in enumerate(shapes):
        raw = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=generator)
        dtype = DTYPES[k % len(DTYPES)]
        wholes.append(raw[..., : dtype.itemsize].contiguous().view(dtype)[..., 0].clone())
    source = data.draw(layouts(shapes))
    target = data.draw(layouts(shapes))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "step_1"))
        write([state_of(held, wholes) for held in source], path)
        with open_checkpoint(path) as checkpoint:
            for held in target:
                requests, expected = [], []
                for k, (tensor_boxes, whole) in enumerate(zip(held, wholes, strict=True)):
                    for box in tensor_boxes:
                        carrier = checkpoint.manifest.meta(f"t{k}").dtype.carrier
                        # every other destination is not contiguous
                        room = np.zeros((*box.sizes, 2), carrier)[..., 0] if k % 2 else np.zeros(box.sizes, carrier)
                        requests.append(Request(f"t{k}", box, room))
                        expected.append(as_bytes(whole)[box.slices()])
                stats = checkpoint.read(requests)
                assert stats.bytes_needed == sum(array.nbytes for array in expected)
                for request, bits in itertools.zip_longest(requests, expected):
                    assert np.ascontiguousarray(request.into).tobytes() == np.ascontiguousarray(bits).tobytes()
