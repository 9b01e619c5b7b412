"""What every test of this project shares: hypothesis' profiles."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

from tests.ranks import start_server

# No deadline per example: on a busy machine a slow example is not a wrong one. The suite tries the same examples each
# time, so that a change is judged by what it changed; the soak searches on, and prints what reproduces what it finds.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile(
    "soak", deadline=None, print_blob=True, max_examples=5000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """For the whole suite, ranks are needed sooner or later: their server imports torch while tests are collected."""
    if session.config.args_source is pytest.Config.ArgsSource.TESTPATHS:
        start_server()
