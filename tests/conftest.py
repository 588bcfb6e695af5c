"""What every test may rely on: one thread, a float64 seed helper, and the `gpu` marker."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.fixtures_side_effects import install, side_effects

__all__ = ["side_effects"]  # a fixture for every test

install()

# Results must not depend on how many cores a machine has, and pytest-xdist shares the cores.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A model that a test leaves to chance is the same whatever ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


@pytest.fixture
def randn64() -> Callable[..., torch.Tensor]:
    """`randn64(*shape, seed=0)`: standard normal float64, without touching the global generator."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return draw
