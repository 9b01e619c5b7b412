"""What every test of this project shares: hypothesis' profiles, and what tells its processes from others."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

SESSION = "CKPT_TESTS"
"""The environment variable that tells the processes of this run of the tests from those of others on the machine."""
os.environ[SESSION] = str(os.getpid())

# No deadline per example: on a busy machine a slow example is not a wrong one. A failure prints what reproduces it.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile(
    "soak", deadline=None, print_blob=True, max_examples=5000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
