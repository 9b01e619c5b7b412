"""What dtypes promise: names, sizes, and names in safetensors that the installed safetensors reads back."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from ckpt_formats.dtypes import DTYPES, carrier_dtype, dtype, from_safetensors
from ckpt_formats.errors import UnknownDtypeError

EVERY = sorted(DTYPES)


@pytest.mark.parametrize("name", EVERY)
def test_sizes_agree(name: str) -> None:
    known = dtype(name)
    assert known.name == name == str(known)
    assert known.carrier.itemsize == known.itemsize
    assert known.carrier == carrier_dtype(known.itemsize)
    assert known.carrier.kind in "uV"
    assert known.array.itemsize == known.itemsize
    if known.numpy is not None:
        assert known.numpy.name == name
        assert known.array is known.numpy


@pytest.mark.parametrize("name", EVERY)
def test_safetensors_reads_it_under_the_name_we_give(name: str, tmp_path: Path) -> None:
    known = dtype(name)
    stored_as = known.safetensors
    shape = [2, 3]
    if stored_as is None:
        stored_as, shape = "U8", [6 * known.itemsize]
    size = 6 * known.itemsize
    header = {"a": {"dtype": stored_as, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    data = bytes(size) if name == "bool" else bytes(range(1, size + 1))
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor("a")
    assert str(tensor.dtype) == ("torch.uint8" if known.safetensors is None else f"torch.{name}")
    assert list(tensor.shape) == shape
    assert tensor.nbytes == size


def test_every_safetensors_name_leads_back() -> None:
    named = [known for known in DTYPES.values() if known.safetensors]
    assert len({known.safetensors for known in named}) == len(named)
    for known in named:
        assert from_safetensors(str(known.safetensors)) is known


@pytest.mark.parametrize("name", ["float128", "", "torch.float32", "qint8", "F32", "object", None, [1]])
def test_an_unknown_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownDtypeError, match="dtype") as caught:
        dtype(name)
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", ["F4", "F6_E2M3", "f32", "C128", "", None])
def test_an_unknown_safetensors_name_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownDtypeError, match="safetensors dtype"):
        from_safetensors(name)


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
def test_carriers_copy_any_bits_between_any_strides(itemsize: int) -> None:
    carrier = carrier_dtype(itemsize)
    source = np.random.default_rng(0).bytes(6 * 4 * itemsize)
    stored = np.frombuffer(source, carrier).reshape(6, 4)
    target = np.zeros((4, 6), carrier)
    target[::-1, :][:, 1:] = stored[1:].T
    expected = np.frombuffer(source, np.uint8).reshape(6, 4, itemsize)[1:].transpose(1, 0, 2)[::-1]
    assert target.view(np.uint8).reshape(4, 6, itemsize)[:, 1:].tobytes() == expected.tobytes()
    assert not target.view(np.uint8).reshape(4, 6, itemsize)[:, 0].any()
