"""How what stands in a value for something kept elsewhere is written in the manifest, and read again.

`{"$tensor": name}`, `{"$per_rank": path}` and `{"$subclass": …}` are leaves of the typed values of ckpt_formats.values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckpt.state.types import Disassembled, PerRankRef, TensorRef
from ckpt_formats.errors import FormatError
from ckpt_formats.values import JsonValue, decode, encode

TENSOR = "tensor"
PER_RANK = "per_rank"
SUBCLASS = "subclass"


def encode_leaf(value: object, path: str) -> JsonValue | None:
    """The `leaf` callback of values.encode: JSON of a reference, None for anything else."""
    if isinstance(value, TensorRef):
        return {f"${TENSOR}": value.name}
    if isinstance(value, PerRankRef):
        return {f"${PER_RANK}": value.path}
    if isinstance(value, Disassembled):
        return {
            f"${SUBCLASS}": {
                "kind": value.kind,
                "parts": list(value.parts),
                "context": encode(value.context, f"{path} (context)"),
            }
        }
    return None


def _tensor(payload: JsonValue, path: str) -> TensorRef:
    if not isinstance(payload, str):
        raise FormatError(f"{path}: a reference to a tensor is its name")
    return TensorRef(payload)


def _per_rank(payload: JsonValue, path: str) -> PerRankRef:
    if not isinstance(payload, str):
        raise FormatError(f"{path}: a reference to a per-rank value is its path")
    return PerRankRef(payload)


def _subclass(payload: JsonValue, path: str) -> Disassembled:
    if not isinstance(payload, dict) or not isinstance(payload.get("kind"), str):
        raise FormatError(f"{path}: a tensor subclass is described by an object")
    parts: Any = payload.get("parts")
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise FormatError(f"{path}: a tensor subclass has named parts")
    return Disassembled(payload["kind"], tuple(parts), decode(payload.get("context"), path))  # type: ignore[arg-type]


LEAVES: Mapping[str, Any] = {TENSOR: _tensor, PER_RANK: _per_rank, SUBCLASS: _subclass}
"""The `leaf` argument of values.decode."""
