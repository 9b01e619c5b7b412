"""Plain values (counters, hyperparameters, orders of data, states of generators) as typed JSON, without pickle.

`encode` turns a value into a tree of JSON that tells a tuple from a list and 1 from 1.0; `decode` turns it back into an
equal value of the same types. docs/values.md specifies the encoding. What has no encoding is refused by its path;
`register_value` teaches both sides a new type. Nothing that an encoded value names is ever imported, and a hostile one
ends in FormatError.

Values know nothing of torch (`ckpt.state.torch_values` registers its types), of ranks, or of where they are stored:
bytes too large for JSON go through a callback, and so do leaves, such as tensors, that the caller keeps elsewhere.
"""

from ckpt_formats.values.comparing import canonical, first_difference
from ckpt_formats.values.decoding import Opaque, decode
from ckpt_formats.values.encoding import encode
from ckpt_formats.values.registered import register_value
from ckpt_formats.values.tree import MAX_DEPTH, JsonValue

__all__ = [
    "MAX_DEPTH",
    "JsonValue",
    "Opaque",
    "canonical",
    "decode",
    "encode",
    "first_difference",
    "register_value",
]
