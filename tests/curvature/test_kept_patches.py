"""Patches of convolutions that are kept between backward passes: the same blocks, less memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import curvscope as cs
from curvscope.curvature import recording
from curvscope.curvature.recording import Recording


class Tied(nn.Module):
    """One layer, used for inputs of three shapes, of which one is channels-last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        whole = torch.tanh(self.conv(x.to(memory_format=torch.channels_last)))
        parts = self.conv(whole[:, :, ::2]), self.conv(x[..., :2])
        return self.head(parts[0].mean((2, 3)) + parts[1].mean((2, 3)))


class Folded(nn.Module):
    """Three positions of each sample in the batch axis of a dilated, grouped convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding="same", dilation=2, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.cat([x[:, :, k].repeat(1, 2, 1)[:, :4] for k in range(3)])
        return self.head(torch.tanh(self.conv(rows)).mean(2).reshape(3, len(x), 6).mean(0))


class Alone(nn.Module):
    """Convolutions of single samples without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 2, 3, stride=2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.head(torch.tanh(self.conv(one)).mean((1, 2))) for one in x])


def problem_of(model: nn.Module) -> cs.Problem:
    """Batches of three sizes, the first not the largest."""
    x = torch.randn(11, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(11) % 3
    batches = [(x[:4], y[:4]), (x[4:10], y[4:10]), (x[10:], y[10:])]
    return cs.Problem(model.double(), nn.CrossEntropyLoss(), batches)


def room(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """``size`` bytes for patches, of 4 GiB."""
    monkeypatch.setattr(recording, "_ROWS_SHARE", size / 2**32)
    monkeypatch.setattr(recording.memory, "available_bytes", lambda device="cpu": 2**32)


@pytest.mark.parametrize("make", [Tied, Folded, Alone])
@pytest.mark.parametrize("memory", ["plenty", "tight"])
def test_blocks_are_those_of_products(
    make: type[nn.Module], memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if memory == "tight":  # room for some of the layers
        room(monkeypatch, 2**15)
    problem = problem_of(make())
    blocks = cs.ggn(problem).blocks
    dense = {name: blocks[name].dense() for name in blocks}
    monkeypatch.undo()
    op = cs.ggn(problem)
    truth = op @ torch.eye(op.shape[0], dtype=torch.float64)
    where = 0
    for name, block in dense.items():
        part = slice(where, where + len(block))
        assert float((block - truth[part, part]).abs().max()) < 1e-12, name
        where = part.stop
    assert where == len(truth)


def test_a_layer_that_is_too_large_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[bool]] = []
    keep = Recording.keep_rows

    def note(self: Recording, wanted: list[int]) -> None:
        keep(self, wanted)
        kept.append([call.keeps_rows for call in self.calls])

    monkeypatch.setattr(Recording, "keep_rows", note)
    # of 4 samples: 25 * 27 numbers of patches each in the first call, 15 * 27 in the second
    room(monkeypatch, 4 * 8 * 30 * 27)
    cs.ggn(problem_of(Tied())).blocks["conv"].dense()
    assert kept[0][:2] == [True, False]
    kept.clear()
    room(monkeypatch, 4 * 8 * 16 * 27)
    cs.ggn(problem_of(Tied())).blocks["conv"].dense()
    assert kept[0][:3] == [False, True, False]
