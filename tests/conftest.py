"""What every test of this project shares: hypothesis' profiles."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# No deadline per example: on a busy machine a slow example is not a wrong one. The suite tries the same examples each
# time, so that a change is judged by what it changed; the soak searches on, and prints what reproduces what it finds.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile(
    "soak", deadline=None, print_blob=True, max_examples=5000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))
