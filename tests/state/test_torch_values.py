"""What torch's small objects promise as values: they come back the same, and generators go on where they were."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
import torch

import ckpt.state.torch_values  # noqa: F401 - importing it registers the types
from ckpt_formats.errors import FormatError, UnsupportedValueError
from ckpt_formats.values import Opaque, decode, encode


def through_json(value: object) -> Any:
    return decode(json.loads(json.dumps(encode(value, "x"), allow_nan=False)), "x")


@pytest.mark.parametrize("kind", [torch.dtype, torch.layout, torch.memory_format])
def test_every_constant_of_torch_comes_back_itself(kind: type) -> None:
    constants = [value for value in vars(torch).values() if isinstance(value, kind)]
    assert len(constants) >= 4
    for constant in constants:
        assert through_json(constant) is constant


@pytest.mark.parametrize("name", ["cpu", "meta", "cuda", "cuda:3", "mps", "xpu:1"])
def test_devices_come_back_whether_this_machine_has_them_or_not(name: str) -> None:
    assert through_json([torch.device(name)]) == [torch.device(name)]


@pytest.mark.parametrize("sizes", [[], [3], [2, 0, 2**40]])
def test_sizes_come_back_as_sizes(sizes: list[int]) -> None:
    back = through_json({"shape": torch.Size(sizes), (torch.Size(sizes),): torch.float32})
    assert type(back["shape"]) is torch.Size
    assert back == {"shape": torch.Size(sizes), (torch.Size(sizes),): torch.float32}


def test_a_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(7)
    torch.randn(3, generator=generator)  # leaves a cached normal behind
    back = through_json({"sampler": generator})["sampler"]
    assert type(back) is torch.Generator
    assert back is not generator
    for draw in (torch.randn, torch.rand):
        assert torch.equal(draw(9, generator=back), draw(9, generator=generator))
    assert torch.equal(torch.randperm(9, generator=back), torch.randperm(9, generator=generator))


def test_a_generator_comes_back_under_a_default_device() -> None:
    encoded = encode(torch.Generator().manual_seed(7), "x")
    with torch.device("meta"):
        back = decode(encoded, "x")
    assert torch.equal(back.get_state(), torch.Generator().manual_seed(7).get_state())


def test_parameters_are_no_values() -> None:
    with pytest.raises(UnsupportedValueError, match=r"^x\[0\] is of type torch\.nn\.parameter\.Parameter"):
        encode([torch.nn.Parameter(torch.zeros(2))], "x")


@pytest.mark.parametrize(
    "encoded",
    [
        {"$torch.dtype": "float7"},
        {"$torch.dtype": "save"},
        {"$torch.dtype": ["float32"]},
        {"$torch.layout": "channels_last"},
        {"$torch.memory_format": None},
        {"$torch.device": "nowhere"},
        {"$torch.device": 0},
        {"$torch.device": "cuda:99999999999999999999"},
        {"$torch.Size": [1.5]},
        {"$torch.Size": {"$tuple": [1]}},
        {"$torch.Size": [True]},
        {"$torch.Size": [{"$int": hex(2**70)}]},
        {"$torch.Size": "12"},
        {"$torch.Generator": "cpu"},
        {"$torch.Generator": {"device": "cpu"}},
        {"$torch.Generator": {"device": "cpu", "state": {"$bytes": ""}}},
        {"$torch.Generator": {"device": "cpu", "state": {"$bytes": "AAAA"}}},
        {"$torch.Generator": {"device": "cpu", "state": {"$bytes": ""}, "more": 1}},
        {"$torch.Generator": {"device": "meta", "state": {"$bytes": "AAAA"}}},
        {"$torch.save": "x"},
    ],
    ids=str,
)
def test_malformed_objects_are_refused_by_path_and_tag(encoded: Any) -> None:
    with pytest.raises(FormatError, match=r"^x\[0\]: .*'torch\.\w+'"):
        decode([encoded], "x")
    assert isinstance(decode([encoded], "x", lenient=True)[0], Opaque)


def test_damaged_generator_states_are_refused_or_drawn_from_safely() -> None:
    state = bytearray(torch.Generator().manual_seed(7).get_state().tolist())
    chance = random.Random(0)
    for _ in range(200):
        damaged = bytearray(state)
        at = chance.choice([chance.randrange(24), chance.randrange(len(damaged) - 40, len(damaged)), 0])
        damaged[at] ^= 1 << chance.randrange(8)
        encoded = {"$torch.Generator": {"device": "cpu", "state": encode(bytes(damaged), "x")}}
        try:
            generator = decode(encoded, "x")
        except FormatError:
            continue
        assert torch.rand(2000, generator=generator).isfinite().all()
