"""What callers may rely on: one base, the builtin they already catch, and messages that print as sentences."""

from __future__ import annotations

import builtins

import pytest

from ckpt_formats import errors
from ckpt_formats.errors import CheckpointError

KINDS = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", KINDS, ids=errors.__all__)
def test_each_error_is_a_checkpoint_error_and_a_builtin(kind: type[Exception]) -> None:
    assert issubclass(kind, CheckpointError)
    if kind is not CheckpointError:
        names = {base.__name__ for base in kind.__mro__ if getattr(builtins, base.__name__, None) is base}
        assert names - {"Exception", "BaseException", "object"}, kind


@pytest.mark.parametrize("kind", KINDS, ids=errors.__all__)
def test_each_error_prints_its_message_and_carries_what_it_is_about(kind: type[CheckpointError]) -> None:
    error = kind("w is damaged; restore it", path="run/step_1", tensor="w", step=1, rank=3)
    assert str(error) == "w is damaged; restore it"
    assert (error.path, error.tensor, error.step, error.rank) == ("run/step_1", "w", 1, 3)


def test_the_module_lists_all_of_its_errors() -> None:
    defined = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}
    assert defined == set(errors.__all__)
