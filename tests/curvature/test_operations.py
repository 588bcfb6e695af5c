"""Operations between two layers: the Hessian against finite differences of the gradient.

Double backward cannot be its own judge: torch has operations whose second derivative is silently
wrong. And each operation is either piecewise linear or not, which decides the route.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import curvscope as cs

from .nets import Apply, seeded

Operation = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
MATRIX = torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64)
KERNEL = torch.randn(2, 1, 3, generator=GENERATOR, dtype=torch.float64)

# functions of [4, 6]; the result is flattened before the next layer
PIECEWISE: dict[str, Operation] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardtanh": F.hardtanh,
    "threshold": lambda x: F.threshold(x, 0.1, 0.3),
    "abs": torch.abs,
    "hardshrink": lambda x: F.hardshrink(x, 0.2),
    "softshrink": lambda x: F.softshrink(x, 0.2),
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "rrelu": F.rrelu,
    "maxout": lambda x: x.reshape(-1, 3, 2).amax(-1),
    "max": lambda x: x.reshape(-1, 3, 2).max(-1).values,
    "minimum": lambda x: torch.minimum(x[:, :3], x[:, 3:]),
    "sort": lambda x: x.sort(-1).values,
    "topk": lambda x: x.topk(3, -1).values,
    "median": lambda x: x.median(-1, keepdim=True).values,
    "where": lambda x: torch.where(x > 0, 2 * x, -x),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.5),
    "max_pool1d": lambda x: F.max_pool1d(x.unsqueeze(1), 2),
    "max_pool2d": lambda x: F.max_pool2d(x.reshape(-1, 1, 2, 3), 2, padding=1),
    "adaptive_max_pool2d": lambda x: F.adaptive_max_pool2d(x.reshape(-1, 1, 2, 3), 2),
    "avg_pool1d": lambda x: F.avg_pool1d(x.unsqueeze(1), 3),
    "avg_pool2d": lambda x: F.avg_pool2d(x.reshape(-1, 1, 2, 3), 2),
    "interpolate": lambda x: F.interpolate(x.unsqueeze(1), scale_factor=2, mode="linear"),
    "bicubic": lambda x: F.interpolate(x.reshape(-1, 1, 2, 3), scale_factor=2, mode="bicubic"),
    "pad": lambda x: F.pad(x.unsqueeze(1), (2, 1), mode="reflect"),
    "roll": lambda x: x.roll(2, -1) - x.flip(-1),
    "cat": lambda x: torch.cat([x[:, 1:3], x[:, ::2], x.sum(-1, keepdim=True)], -1),
    "stack": lambda x: torch.stack(x.unbind(-1)[:3], -1),
    "cumsum": lambda x: x.cumsum(-1),
    "gather": lambda x: x.gather(1, torch.tensor([[0, 2, 2, 5]]).expand(len(x), -1)),
    "index": lambda x: x[:, [0, 3, 1]],
    "matmul": lambda x: x @ MATRIX,
    "einsum": lambda x: torch.einsum("ni,ij->nj", x, MATRIX),
    "conv1d": lambda x: F.conv1d(x.unsqueeze(1), KERNEL, padding=1),
    "conv_transpose1d": lambda x: F.conv_transpose1d(x.reshape(-1, 2, 3), KERNEL, stride=2),
    "unfold": lambda x: x.unfold(1, 2, 1),
    "im2col": lambda x: F.unfold(x.reshape(-1, 1, 2, 3), (2, 2)),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4].reshape(-1, 4, 1, 1), 2),
    "mean": lambda x: x.reshape(-1, 2, 3).mean(1) / 3,
    "tril": lambda x: x.reshape(-1, 2, 3).tril(),
    "diagonal": lambda x: x.reshape(-1, 2, 3).diagonal(dim1=1, dim2=2),
}

SMOOTH: dict[str, Operation] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "elu": F.elu,
    "celu": lambda x: F.celu(x, 0.7),
    "selu": F.selu,
    "softplus": lambda x: F.softplus(x, 2.0),
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "glu": F.glu,
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1, keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "norm": lambda x: x.norm(dim=-1, keepdim=True),
    "p-norm": lambda x: x.norm(3, dim=-1, keepdim=True),
    "square": torch.square,
    "power": lambda x: x.abs() ** 1.7,
    "product": lambda x: x[:, :3] * x[:, 3:],
    "prod": lambda x: x.reshape(-1, 3, 2).prod(-1),
    "quotient": lambda x: x[:, :3] / (3 + x[:, 3:].abs()),
    "exp-log": lambda x: (x.exp() + 1).log(),
    "sin": torch.sin,
    "atan2": lambda x: torch.atan2(x[:, :3], x[:, 3:]),
    "erf": torch.erf,
    "layer_norm": lambda x: F.layer_norm(x, (6,)),
    "rms_norm": lambda x: F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x.reshape(-1, 2, 3), 2),
    "instance_norm": lambda x: F.instance_norm(x.reshape(-1, 2, 3)),
    "local_response_norm": lambda x: F.local_response_norm(x.unsqueeze(-1), 2),
    "lp_pool": lambda x: F.lp_pool1d(x.abs().unsqueeze(1), 2.0, 2),
    "cosine": lambda x: F.cosine_similarity(x[:, :3], x[:, 3:]).unsqueeze(1),
    "pairwise": lambda x: F.pairwise_distance(x[:, :3], x[:, 3:], keepdim=True),
    "cdist": lambda x: torch.cdist(x.reshape(-1, 2, 3), x.reshape(-1, 2, 3).flip(1) + 1),
    "gram": lambda x: x.reshape(-1, 2, 3) @ x.reshape(-1, 2, 3).mT,
    "bilinear": lambda x: F.bilinear(x, x, MATRIX.reshape(6, 6)[None].expand(2, 6, 6)),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.reshape(-1, 1, 3, 2)] * 3),
    "var": lambda x: x.var(-1, keepdim=True),
    "std": lambda x: x.std(-1, keepdim=True),
    "cumprod": lambda x: x.cumprod(-1),
    "logcumsumexp": lambda x: x.logcumsumexp(-1),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "solve": lambda x: torch.linalg.solve(
        x[:, :4].reshape(-1, 2, 2) + 4 * torch.eye(2).double(), x[:, 4:]
    ),
    "slogdet": lambda x: (x[:, :4].reshape(-1, 2, 2) + 4 * torch.eye(2).double()).logdet()[:, None],
    "eigvalsh": lambda x: torch.linalg.eigvalsh(
        x[:, :4].reshape(-1, 2, 2) + x[:, :4].reshape(-1, 2, 2).mT
    ),
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "lerp": lambda x: torch.lerp(x, x.sin(), 0.3),
    "hypot": lambda x: torch.hypot(x[:, :3], x[:, 3:]),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "max-of-squares": lambda x: x.square().amax(-1, keepdim=True),
    "relu-squared": lambda x: F.relu(x).square(),
    "grid_sample": lambda x: F.grid_sample(
        MATRIX.reshape(1, 1, 6, 6).expand(len(x), 1, 6, 6),
        x.tanh().reshape(-1, 1, 3, 2),
        align_corners=False,
    ),
}
ALL = {**PIECEWISE, **SMOOTH}


def problem_with(operation: Operation) -> cs.Problem:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (4,), generator=generator)
    width = operation(torch.ones(4, 6, dtype=torch.float64).cumsum(1)).flatten(1).shape[1]
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(3, 6), Apply(operation), nn.Flatten(), nn.Linear(width, 3, bias=False)
        )
    )
    return cs.Problem(model, nn.CrossEntropyLoss(), (x, y))


def difference_hessian(problem: cs.Problem, step: float = 1e-5) -> Tensor:
    """Central differences of the gradient."""
    parameters = list(problem.params.values())
    rows = []
    for p in parameters:
        flat = p.data.view(-1)
        for k in range(flat.numel()):
            before = float(flat[k])
            flat[k] = before + step
            high = problem.gradient()
            flat[k] = before - step
            low = problem.gradient()
            flat[k] = before
            rows.append((high - low) / (2 * step))
    return torch.stack(rows)


@pytest.mark.parametrize("name", ALL)
def test_hessian_against_finite_differences(name: str) -> None:
    problem = problem_with(ALL[name])
    op = cs.hessian(problem)
    try:
        block = op.blocks["0"].dense()
    except cs.errors.UnsupportedLayerError as error:
        assert name == "cdist", error  # as long as torch cannot differentiate it twice
        assert "without second derivative" in str(error)
        return
    size = block.shape[0]
    truth = difference_hessian(problem)[:size, :size]
    assert float((block - truth).norm()) <= 1e-7 * max(float(truth.norm()), 1.0)
    linear = "piecewise-linear" in op.plans["0"].routes
    assert linear == (name in PIECEWISE)
