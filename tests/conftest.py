"""Shared set-up: hypothesis profiles, one torch thread per process, and the marker of property-based tests."""

import os

import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

# Examples are drawn afresh in `make fuzz` only: in `make test` the same commit must give the same answer.
settings.register_profile("default", deadline=None, derandomize=True, max_examples=25)
settings.register_profile(
    "long", deadline=None, max_examples=1000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("VERIFINE_HYPOTHESIS", "default"))


def pytest_configure(config: pytest.Config) -> None:
    import torch

    torch.set_num_threads(1)
    config.addinivalue_line("markers", "property: a property-based test (selected by `make fuzz`)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_hypothesis_test(getattr(item, "obj", None)):
            item.add_marker(pytest.mark.property)
