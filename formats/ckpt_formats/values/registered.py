"""Users' own types of values, made from values that have an encoding already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ckpt_formats.errors import StateError
from ckpt_formats.values.decoding import DECODERS, CannotDecodeError, Decoder
from ckpt_formats.values.encoding import ENCODERS, Encoder, refused, type_name
from ckpt_formats.values.tree import JsonValue, Where

__all__ = ["register_value"]

_T = TypeVar("_T")

_registered: dict[str, type] = {}
"""Tag -> the class that was registered under it."""


def register_value(
    kind: type[_T], encode: Callable[[_T], object], decode: Callable[[Any], _T], *, tag: str | None = None
) -> None:
    """Let values of exactly the type `kind` (not its subclasses) be saved, and be loaded wherever this has been called.

    Args:
        kind: the type.
        encode: returns anything that can be saved: plain values, arrays, or values of other registered types.
        decode: makes the value from what `encode` returned. It is called with whatever a checkpoint holds under this
            tag, so it should check before it trusts.
        tag: the type's name in checkpoints, with a dot in it; by default the class's module and qualified name. State
            it to stay free to move or rename the class.

    A class that is registered again under its tag, as when a notebook's cell is run twice, replaces the one before.

    Raises StateError if the type or the tag is taken, or the tag has no dot.
    """
    name = f"{kind.__module__}.{kind.__qualname__}" if tag is None else tag
    if "." not in name or not name.isprintable():
        raise StateError(f"the tag {name!r} for {type_name(kind)} needs a dot, as in 'mylib.{kind.__name__}'")
    former = _registered.get(name)
    if former is not None and (former.__module__, former.__qualname__) == (kind.__module__, kind.__qualname__):
        # the same class again: a notebook's cell that was run twice, or a module that was reloaded
        ENCODERS.pop(former, None)
        DECODERS.pop(name, None)
    if kind in ENCODERS:
        raise StateError(f"values of type {type_name(kind)} have an encoding already; a type is registered only once")
    if name in DECODERS:
        raise StateError(f"the tag {name!r} is taken already; give {type_name(kind)} another one with tag=...")

    def encode_registered(encoder: Encoder, value: Any, where: Where, depth: int) -> JsonValue:
        try:
            content = encode(value)
        except Exception as error:
            reason = (
                f"can't be saved: the encoder registered for {type_name(kind)} failed: {type(error).__name__}: {error}"
            )
            raise refused(where, reason) from error
        return {f"${name}": encoder.value(content, where, depth + 1)}

    def decode_registered(decoder: Decoder, payload: Any, where: Where, depth: int) -> Any:
        content = decoder.value(payload, where, depth + 1)
        try:
            return decode(content)
        except Exception as error:
            raise CannotDecodeError(
                f"the decoder registered for {name!r} failed: {type(error).__name__}: {error}"
            ) from error

    _registered[name] = kind
    ENCODERS[kind] = encode_registered
    DECODERS[name] = decode_registered
