"""The states of the global random generators: Python's, numpy's, torch's on the CPU and on each device in use.

They differ between ranks, so each rank saves and gets back its own. Knows nothing of how values are stored, but keeps
to types that can be.
"""

from __future__ import annotations

import hashlib
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["RNG"]


class RNG:
    """Put one into a state (`{"rng": ckpt.RNG(), …}`) and random numbers go on where they stopped.

    Generators that the training made itself (`torch.Generator`, `numpy.random.Generator`) are not among them.
    """

    def state_dict(self) -> dict[str, Any]:
        """States as bytes, arrays and numbers; reading them draws no number and starts no device."""
        version, keys, gauss = random.getstate()
        return {
            "python": {"version": version, "keys": np.array(keys, dtype=np.uint32), "gauss": gauss},
            "numpy": np.random.get_state(legacy=False),  # noqa: NPY002 - it is the global generator that is saved
            "torch": _bytes(torch.get_rng_state()),
            "devices": {
                f"{kind}:{index}": _bytes(state)
                for kind, module in _accelerator(in_use=True)
                for index, state in enumerate(_device_states(module))
            },
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the generators. A device that this process doesn't have, or that was not saved, is warned about."""
        python = state_dict["python"]
        random.setstate((python["version"], tuple(int(key) for key in python["keys"]), python["gauss"]))
        np.random.set_state(state_dict["numpy"])  # noqa: NPY002
        torch.set_rng_state(_tensor(state_dict["torch"]))
        accelerator = dict(_accelerator(in_use=False))
        for device, state in state_dict["devices"].items():
            kind, _, index = device.partition(":")
            module = accelerator.get(kind)
            if module is None or int(index) >= module.device_count():
                warnings.warn(
                    f"the random generator of {device} was saved, but this process has no such device; "
                    "its random numbers do not go on where they stopped",
                    stacklevel=2,
                )
            elif hasattr(module, "get_rng_state_all"):
                module.set_rng_state(_tensor(state), int(index))
            else:
                module.set_rng_state(_tensor(state))

    def derive(self, state_dict: Mapping[str, Any], rank: int, world_size: int) -> None:
        """Seed the generators, since another number of ranks saved theirs.

        The seed is the SHA-256 of one saved rank's states, this rank and the number of ranks: the same whenever the
        same checkpoint is loaded by as many ranks, and another on each rank and for each checkpoint.

        Args:
            state_dict: what rank `rank` modulo the number of ranks that saved had saved.
            rank: this rank.
            world_size: how many ranks there are now.
        """
        seed = hashlib.sha256(bytes(state_dict["torch"]))
        seed.update(np.ascontiguousarray(state_dict["python"]["keys"]).tobytes())
        seed.update(f"{rank}/{world_size}".encode())
        number = int.from_bytes(seed.digest(), "little")
        random.seed(number)
        np.random.seed(number >> 64 & 0xFFFFFFFF)  # noqa: NPY002 - as above
        torch.manual_seed(number >> 128 & (1 << 63) - 1)  # of every device, too


def _accelerator(*, in_use: bool) -> Iterator[tuple[str, Any]]:
    """Type of this machine's accelerator and torch's module of it; with `in_use`, only if this process started it."""
    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None:
        return
    module = torch.get_device_module(device)
    if hasattr(module, "get_rng_state") and (not in_use or getattr(module, "is_initialized", lambda: True)()):
        yield device.type, module


def _device_states(module: Any) -> list[torch.Tensor]:
    return list(module.get_rng_state_all()) if hasattr(module, "get_rng_state_all") else [module.get_rng_state()]


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
