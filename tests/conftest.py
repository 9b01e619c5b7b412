"""What every test of this project shares: hypothesis' profiles."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline per example: on a busy machine a slow example is not a wrong one. A failure prints what reproduces it.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile(
    "soak", deadline=None, print_blob=True, max_examples=5000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
