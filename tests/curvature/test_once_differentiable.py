"""A backward pass that cannot be differentiated is refused, not taken for constant."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

import curvscope as cs


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(Square.apply(self.first(x)))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    data = torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,))
    return cs.Problem(Net().double(), nn.CrossEntropyLoss(), data)


@pytest.mark.parametrize(
    "use",
    [
        lambda p: cs.hessian(p).dense(),
        lambda p: cs.hessian(p).blocks["first"].dense(),
        lambda p: cs.hessian(p) @ torch.ones(26, dtype=torch.float64),
        lambda p: cs.ggn(p) @ torch.ones(26, dtype=torch.float64),
    ],
)
def test_second_derivatives_are_refused(problem, use):
    with pytest.raises(cs.errors.UnsupportedLayerError, match="once_differentiable"):
        use(problem)


def test_what_needs_one_backward_pass_is_exact(problem):
    inputs, _ = next(iter(problem.data))
    model = problem.user_model
    logits = model(inputs)
    jacobian = torch.stack(
        [
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        z, list(model.first.parameters()), retain_graph=True
                    )
                ]
            )
            for z in logits.flatten()
        ]
    )
    p = logits.softmax(1).detach()
    middle = torch.block_diag(*(torch.diag_embed(p) - p[:, :, None] * p[:, None, :]))
    truth = jacobian.T @ middle @ jacobian / len(inputs)
    block = cs.ggn(problem).blocks["first"].dense()
    assert float((block - truth).norm() / truth.norm()) < 1e-12
