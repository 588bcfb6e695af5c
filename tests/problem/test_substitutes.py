"""What of torch is replaced while a model is evaluated: same values, right derivatives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import curvscope as cs
from tests.curvature.nets import mlp, seeded
from tests.truth import dense_hessian, jacobian_rows, relative

from .refusals import CE, X, Y, net

# -- what is replaced while a model is evaluated -----------------------------------------------


def dense_truth(model: nn.Module) -> Tensor:
    return dense_hessian(CE()(model(X), Y), list(model.parameters()))


def test_gradient_hooks_have_no_say() -> None:
    """Clipping in a hook belongs to training; the curvature is that of the objective."""
    model = net()
    truth = dense_truth(model)
    gradient = cs.Problem(model, CE(), (X, Y)).gradient()
    fired = []
    model[0].weight.register_hook(lambda g: fired.append(1) or 0.5 * g)
    model[0].register_full_backward_hook(lambda m, gi, go: (None if gi[0] is None else 3 * gi[0],))
    model[2].register_full_backward_pre_hook(lambda m, go: (2 * go[0],))
    p = cs.Problem(model, CE(), (X, Y))
    assert relative(cs.hessian(p).dense(), truth) < 1e-12
    assert relative(p.gradient(), gradient) < 1e-12
    for name, members in cs.hessian(p).members.items():
        index = p.layout.index(members)
        assert relative(cs.hessian(p).blocks[name].dense(), truth[index][:, index]) < 1e-12
    assert not fired
    with pytest.warns(UserWarning, match="Full backward hook"):
        CE()(model(X), Y).backward()
    assert fired  # they are still there


def test_forward_hooks_belong_to_the_model() -> None:
    model = net()
    model[0].register_forward_hook(lambda m, i, o: 2 * o + o.sin())
    model[2].register_forward_pre_hook(lambda m, i: (i[0] + 1,))
    p = cs.Problem(model, CE(), (X, Y))
    truth = dense_truth(model)
    op = cs.hessian(p)
    for name, members in op.members.items():
        index = p.layout.index(members)
        assert relative(op.blocks[name].dense(), truth[index][:, index]) < 1e-12


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body = mlp(nn.Tanh, 3, 4, 3)
        self.head = nn.Linear(3, 3)
        self.reentrant: bool | None = reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(reentrant: bool) -> None:
    """``autograd.grad`` sees no parameter in a reentrant checkpoint: it is left out of account."""
    model = seeded(lambda: Checkpointed(reentrant))
    plain = copy.deepcopy(model)
    plain.reentrant = None
    truth = dense_truth(plain)
    p = cs.Problem(model, CE(), (X, Y))
    assert relative(cs.hessian(p).dense(), truth) < 1e-12
    for name, members in cs.hessian(p).members.items():
        index = p.layout.index(members)
        assert relative(cs.hessian(p).blocks[name].dense(), truth[index][:, index]) < 1e-12
    assert list(cs.kfac(p).blocks) == ["body.0", "body.2", "head"]


def test_compiled_models() -> None:
    """Compiled code has no double backward, so it runs uncompiled meanwhile."""
    truth = dense_truth(net())
    whole = torch.compile(net(), backend="eager")
    in_place = net()
    in_place.compile(backend="eager")
    for model in (whole, in_place):
        p = cs.Problem(model, CE(), (X, Y))
        plain = cs.Problem(net(), CE(), (X, Y))
        assert relative(cs.hessian(p).dense(), truth) < 1e-12
        assert relative(cs.ggn(p).dense(), cs.ggn(plain).dense()) < 1e-12
        assert p.layout == plain.layout and p.blocks == plain.blocks
        optimizer = cs.optim.KFAC(model, lr=0.1, damping=0.1)
        assert list(optimizer.params) == list(plain.params)


class Bag(nn.Module):
    def __init__(self, sparse: bool, bag: bool) -> None:
        super().__init__()
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.embed = kind(5, 3, sparse=sparse)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        return self.head(torch.tanh(h if h.ndim == 2 else h.mean(1)))


@pytest.mark.parametrize("bag", [True, False])
def test_sparse_embeddings(bag: bool) -> None:
    tokens = torch.tensor([[0, 1], [4, 3], [2, 2], [1, 1], [3, 0], [2, 4]])
    sparse, full = seeded(lambda: Bag(True, bag)), seeded(lambda: Bag(False, False))
    problems = [cs.Problem(m, CE(), (tokens, Y)) for m in (sparse, full)]
    assert relative(problems[0].gradient(), problems[1].gradient()) < 1e-12
    for matrix in (cs.ggn, cs.fisher, cs.empirical_fisher):
        first, second = (matrix(p) for p in problems)
        assert relative(first.dense(), second.dense()) < 1e-12
        assert relative(first.blocks["embed"].dense(), second.blocks["embed"].dense()) < 1e-12
    if bag:
        with pytest.raises(cs.errors.UnsupportedLayerError, match="without second derivative"):
            cs.hessian(problems[0]).dense()
    else:
        hessians = [cs.hessian(p).dense() for p in problems]
        assert relative(hessians[0], hessians[1]) < 1e-12
    assert sparse.embed.sparse


def test_padding_in_transformers_is_computed_as_in_training() -> None:
    """The inference kernels leave padded positions out; objective and gradient must agree."""
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True).double().eval()
    model.requires_grad_(False)
    head = nn.Linear(4, 2).double()
    whole = nn.ModuleList([model, head])
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    mask = torch.tensor([[False, False, True], [False, True, True]])

    def forward(m: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
        h = m[0](inputs[0], src_key_padding_mask=inputs[1])
        return m[1](h).mean(1)

    p = cs.Problem(whole, CE(), ((x, mask), torch.tensor([0, 1])), forward=forward)
    value = p.objective()
    with torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        truth = CE()(forward(whole, (x, mask)), torch.tensor([0, 1]))
        torch.backends.mha.set_fastpath_enabled(True)
    assert value == pytest.approx(float(truth), rel=1e-12)


def test_scripted_models_keep_their_flags() -> None:
    truth = dense_truth(net())
    with pytest.warns((DeprecationWarning, FutureWarning)):
        scripted = torch.jit.script(net().train())
    p = cs.Problem(scripted, CE(), (X, Y))
    assert relative(cs.hessian(p).dense(), truth) < 1e-12
    cs.kfac(p, uncovered="zero")
    assert all(module.training for module in scripted.modules())


class Tenfold(torch.autograd.Function):
    """``10 x`` with a backward pass that autograd cannot see through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 10 * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(10 * g.detach().numpy())


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(x @ self.first.weight.T)  # no recorded layer: by double backward
        return self.second(Tenfold.apply(h))


def test_functions_that_hide_their_derivative() -> None:
    """The GGN needs first derivatives only, and is exact; the Hessian is refused, not wrong."""
    model = seeded(Opaque)
    p = cs.Problem(model, CE(), (X, Y))
    z = model(X)
    J = jacobian_rows(z, list(model.parameters()))
    s = z.softmax(1)
    M = torch.block_diag(*(torch.diag_embed(s) - s.unsqueeze(2) * s.unsqueeze(1))).detach() / 6
    truth = J.T @ M @ J
    op = cs.ggn(p)
    assert relative(op @ torch.eye(len(truth), dtype=torch.float64), truth) < 1e-12
    assert relative(cs.ggn(p).dense(), truth) < 1e-12
    index = p.layout.index(["first.weight"])
    assert (
        relative(
            cs.ggn(p).blocks["first"].restrict(["first.weight"]).dense(), truth[index][:, index]
        )
        < 1e-12
    )
    with pytest.raises(cs.errors.UnsupportedLayerError, match="asymmetric"):
        cs.hessian(p).dense()
