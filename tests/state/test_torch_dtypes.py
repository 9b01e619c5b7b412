"""What torch dtypes promise: all of torch's are known, and carriers are the tensor's own memory, bit for bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckpt.state.torch_dtypes import as_carrier, bytes_view, dtype_of, from_carrier, torch_dtype
from ckpt_formats.dtypes import DTYPES
from ckpt_formats.errors import UnknownDtypeError, UnsupportedValueError

OF_TORCH = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
QUANTISED = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
STORABLE = sorted(OF_TORCH - QUANTISED, key=str)


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A tensor of arbitrary bits (0 and 1 where bool)."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    data = bytearray(random.Random(seed).randbytes(size))
    if dtype == torch.bool:
        data = bytearray(byte & 1 for byte in data)
    if not size:
        return torch.zeros(0, dtype=torch.uint8).view(dtype).reshape(shape)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a contiguous tensor through torch's own views (most of these dtypes have no comparison)."""
    return bytes(tensor.detach().reshape(-1).view(torch.uint8).tolist())


def test_every_dtype_of_this_torch_is_known_or_refused() -> None:
    assert {dtype_of(dtype).name for dtype in STORABLE} == set(DTYPES)
    for dtype in STORABLE:
        assert dtype_of(dtype).itemsize == dtype.itemsize
        assert torch_dtype(dtype_of(dtype).name) is dtype


@pytest.mark.parametrize("dtype", sorted(QUANTISED, key=str))
def test_quantised_dtypes_are_refused_with_the_remedy(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedValueError, match="int_repr"):
        dtype_of(dtype)
    with pytest.raises(UnsupportedValueError, match=str(dtype)):
        from_carrier(np.zeros(4, np.uint8), dtype)


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantize:DeprecationWarning")
def test_a_quantised_tensor_is_refused_with_the_remedy() -> None:
    tensor = torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8)
    for view in (as_carrier, bytes_view):
        with pytest.raises(UnsupportedValueError, match="q_scale"):
            view(tensor)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(UnknownDtypeError, match="float7"):
        torch_dtype("float7")


@pytest.mark.parametrize("dtype", STORABLE, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5,), (3, 4)], ids=str)
def test_bytes_are_the_tensors_own(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = filled(shape, dtype)
    view = bytes_view(tensor)
    assert (view.format, view.ndim, view.nbytes) == ("B", 1, tensor.nbytes)
    assert not view.readonly
    assert bytes(view) == bits(tensor)
    if view.nbytes:
        view[0] ^= 1
        assert bits(tensor)[0] == view[0]


@pytest.mark.parametrize("dtype", STORABLE, ids=str)
def test_a_carrier_has_the_tensors_shape_strides_and_memory(dtype: torch.dtype) -> None:
    base = filled((6, 4, 3), dtype)
    for tensor in (base, base.permute(2, 0, 1), base[1::2, :, 2], base[2, 1, 1], base[:, 4:], base[0, 0].expand(5, 3)):
        carrier = as_carrier(tensor)
        assert carrier.dtype == dtype_of(dtype).carrier
        assert carrier.shape == tuple(tensor.shape)
        assert carrier.flags.writeable
        if tensor.numel():
            assert carrier.ctypes.data == tensor.data_ptr()
            assert [stride // dtype.itemsize for stride in carrier.strides] == list(tensor.stride())
            assert np.shares_memory(carrier, as_carrier(base))
        back = from_carrier(carrier, dtype)
        assert (back.dtype, back.shape) == (dtype, tensor.shape)
        if tensor.numel():
            assert (back.data_ptr(), back.stride()) == (tensor.data_ptr(), tensor.stride())


@given(
    dtype=st.sampled_from(STORABLE),
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    data=st.data(),
)
def test_strided_copies_through_carriers_are_bit_exact(
    dtype: torch.dtype, shape: list[int], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(shape))))
    source = filled(tuple(shape), dtype, seed=1).permute(*order)
    index = tuple(slice(data.draw(st.integers(0, size - 1)), None) for size in source.shape)
    target = filled(tuple(source.shape), dtype, seed=2)
    before = [bits(target[place]) for place in np.ndindex(*target.shape)]
    as_carrier(target[index])[...] = as_carrier(source[index])
    for place, old in zip(np.ndindex(*target.shape), before, strict=True):
        picked = all(at >= part.start for at, part in zip(place, index, strict=True))
        assert bits(target[place]) == (bits(source[place]) if picked else old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128], ids=str)
def test_parameters_are_seen_without_their_gradient(dtype: torch.dtype) -> None:
    parameter = torch.nn.Parameter(filled((3, 2), dtype))
    version = parameter._version
    as_carrier(parameter)[...] = as_carrier(filled((3, 2), dtype, seed=5))
    assert bytes(bytes_view(parameter)) == bits(filled((3, 2), dtype, seed=5))
    assert parameter.requires_grad
    assert parameter._version == version


def test_a_tensor_with_a_pending_conjugate_or_negation_gives_its_values() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j, 5 + 0j])
    assert bytes(bytes_view(tensor.conj())) == np.array([1 - 2j, 3 + 4j, complex(5, -0.0)], np.complex64).tobytes()
    negated = tensor.conj().imag
    assert negated.is_neg()
    assert bytes(bytes_view(negated)) == np.array([-2.0, 4.0, -0.0], np.float32).tobytes()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.complex32], ids=str)
def test_a_carrier_of_a_pending_conjugate_is_refused_for_its_memory_is_not_its_value(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedValueError, match="resolve_conj"):
        as_carrier(filled((3,), dtype).conj())


def test_a_carrier_of_a_pending_negation_is_refused() -> None:
    with pytest.raises(UnsupportedValueError, match="resolve_neg"):
        as_carrier(torch.tensor([1 + 2j, 3 - 4j]).conj().imag)


@pytest.mark.parametrize(
    "tensor",
    [torch.empty(3, device="meta"), torch.eye(3).to_sparse(), torch.empty(3, device="meta", dtype=torch.bfloat16)],
    ids=["meta", "sparse", "meta bfloat16"],
)
def test_tensors_without_plain_memory_are_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedValueError, match="can't be viewed"):
        as_carrier(tensor)


def test_bytes_of_a_strided_tensor_are_refused_rather_than_copied() -> None:
    with pytest.raises(ValueError, match="not contiguous"):
        bytes_view(torch.zeros(3, 4).t())


def test_a_tensor_of_a_read_only_or_odd_sized_array_is_refused() -> None:
    frozen = np.zeros(4, np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="writable"):
        from_carrier(frozen, torch.float32)
    with pytest.raises(ValueError, match="4-byte"):
        from_carrier(np.zeros(4, np.uint16), torch.float32)
