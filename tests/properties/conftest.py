"""How much the property tests try: the same examples on every run, and ten times as many, new each
time, by `make test-long`."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# What is slow here is the machine, and a file in `tmp_path` is written anew by every example.
_COMMON = {
    "deadline": None,
    "database": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
}
settings.register_profile("suite", derandomize=True, max_examples=100, **_COMMON)
settings.register_profile("long", max_examples=1000, **_COMMON)
settings.load_profile("suite")
