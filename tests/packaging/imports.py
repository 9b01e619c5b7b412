"""What the packages must not import, and how to see what they do: in a fresh interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable

# Optional or foreign: a user who has them pays for them when they are used, not at `import ckpt`.
IMPORT_CKPT_NEVER_IMPORTS = frozenset(
    {
        "accelerate",
        "aiobotocore",
        "boto3",
        "botocore",
        "deepspeed",
        "lightning",
        "matplotlib",
        "megatron",
        "pandas",
        "ray",
        "rich",
        "s3fs",
    }
    | {"safetensors", "torchtitan", "transformers"}
)
USE_CKPT = "import ckpt; [getattr(ckpt, name) for name in ckpt.__all__]"
"""The front door imports what is behind a name when it is used first."""
FORMATS_NEVER_IMPORT = IMPORT_CKPT_NEVER_IMPORTS | {"ckpt", "ckpt_cli", "fsspec", "torch"}


def modules_after(statement: str, run: Callable[..., str]) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after `statement`.

    `run("python", …)` runs an interpreter with these arguments and returns what it printed.
    """
    program = f"import sys\n{statement}\nimport json\nprint(json.dumps(sorted(sys.modules)))"
    return {name.partition(".")[0] for name in json.loads(run("python", "-I", "-c", program))}
