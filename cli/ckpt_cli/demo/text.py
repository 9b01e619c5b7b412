"""The demo's text and the order in which it is read. Knows no ranks but those that `Sampler.batch` is told of.

The text is the one that CPython brings along for `help()`: real English, on every machine, with nothing to download.
"""

from __future__ import annotations

from typing import Any

import torch

WINDOW = 64  # bytes that one sample predicts


class Text:
    """The text as numbers: each byte that occurs is a symbol."""

    def __init__(self) -> None:
        # Imported here: it is half a megabyte, and the driver, which only counts steps, has no use for it.
        from pydoc_data.topics import topics

        text = "\n\n".join(topics[name] for name in sorted(topics)).encode()
        self.symbols = bytes(sorted(set(text)))
        to_symbol = torch.zeros(256, dtype=torch.int64)
        to_symbol[torch.tensor(list(self.symbols))] = torch.arange(len(self.symbols))
        self._to_symbol = to_symbol
        self.numbers = self.encode(text)

    def encode(self, text: bytes) -> torch.Tensor:
        """The symbols' numbers, one per byte, int64. The bytes must occur in the text."""
        return self._to_symbol[torch.frombuffer(bytearray(text), dtype=torch.uint8).long()]

    def decode(self, numbers: list[int]) -> str:
        """The string that the symbols with these numbers spell; what is no UTF-8 is replaced."""
        return bytes(self.symbols[number] for number in numbers).decode(errors="replace")


class Sampler:
    """Cuts the text into windows and serves them in a shuffled order that depends on the seed alone.

    Sample k is the same window whatever the number of ranks, and the state is one plain number: how many samples have
    been drawn. So any number of ranks goes on exactly where any other number stopped.
    """

    def __init__(self, text: Text, *, seed: int) -> None:
        self.samples_drawn = 0
        self._text = text
        self._windows = (len(text.numbers) - 1) // WINDOW
        self._order = torch.randperm(self._windows, generator=torch.Generator().manual_seed(seed))

    def batch(self, size: int, part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One of `parts` equal parts of the next `size` samples: inputs and targets, [size / parts, WINDOW] each."""
        share = size // parts
        first = self.samples_drawn + part * share
        starts = self._order[torch.arange(first, first + share) % self._windows] * WINDOW
        places = starts[:, None] + torch.arange(WINDOW)
        self.samples_drawn += size
        return self._text.numbers[places], self._text.numbers[places + 1]

    def state_dict(self) -> dict[str, Any]:
        return {"samples_drawn": self.samples_drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples_drawn = state["samples_drawn"]
