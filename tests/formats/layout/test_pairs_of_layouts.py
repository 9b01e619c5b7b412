"""Any layout to any other, without processes: what a framework's cut has of each tensor is where the rules say."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from random import Random

import numpy as np
import pytest

from ckpt_formats.layout import Layout, Resolved, assemble
from tests.formats.layout.models import Array, Case, arrays_of, case_of, families


def moved(source: Resolved, ranks: list[dict[str, Array]], target: Resolved) -> list[dict[str, Array]]:
    """The ranks' tensors under the target layout, made of those under the source layout, box by box."""
    made = []
    for rank in range(target.mesh.size):
        held = {}
        for tensor in target.local(rank).values():
            array = np.zeros(tensor.shape, np.int64)
            for piece in tensor.pieces:
                filled = 0
                for holder in source.holders(piece.tensor, piece.box):
                    there = ranks[source.mesh.first_rank(holder.where)][holder.local]
                    part = piece.clip(holder.piece.box)
                    assert part is not None
                    part.view(array)[...] = holder.piece.view(there)
                    filled += 0 if holder.piece.copy else holder.piece.box.numel
                assert filled == piece.box.numel
            held[tensor.name] = array
        made.append(held)
    return made


def the_same(made: list[dict[str, Array]], expected: list[dict[str, Array]]) -> None:
    for rank, (here, there) in enumerate(zip(made, expected, strict=True)):
        assert {name: array.shape for name, array in here.items()} == {
            name: array.shape for name, array in there.items()
        }, f"rank {rank}"
        for name, array in there.items():
            np.testing.assert_array_equal(here[name], array, err_msg=f"{name} of rank {rank}")


def resolved(case: Case, arrays: dict[str, Array]) -> Resolved:
    again = Layout.parse(case.layout.to_toml())
    assert again == case.layout
    return again.resolve(case.mesh, {name: array.shape for name, array in arrays.items()})


def check(seed: int) -> None:
    random = Random(seed)
    chosen = families(random)
    arrays = arrays_of(chosen)
    source, target = case_of(random, chosen, arrays), case_of(random, chosen, arrays)
    here, there = resolved(source, arrays), resolved(target, arrays)
    the_same(moved(here, source.ranks, there), target.ranks)
    for name, array in arrays.items():
        if array.size:
            whole = assemble(here, name, lambda rank, local: source.ranks[rank][local])
            np.testing.assert_array_equal(whole, array)


def check_all(seeds: Iterable[int]) -> None:
    for seed in seeds:
        try:
            check(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("block", range(10))
def test_a_thousand_random_pairs_of_layouts(block: int) -> None:
    check_all(range(block * 100, block * 100 + 100))


@pytest.mark.soak
@pytest.mark.parametrize("block", range(20))
def test_many_more_random_pairs_of_layouts(block: int) -> None:
    check_all(secrets.randbits(64) for _ in range(1000))
