"""Other libraries as oracles, pinned in the dev extra: where they agree, and their known errors.

A known error is asserted as such: the peer is off by a stated amount (or equals a stated wrong
formula) while this package agrees with the dense truth. So a release that repairs it is noticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvscope as cs
from tests.truth import dense_hessian, relative

from . import factors as definition
from .cases import BCE, CE, MSE
from .draws import W3, bits, data, labels, real, soft
from .nets import Apply, mlp, seeded, tokens_last

MISSING = "the oracles are installed with the dev extra: pip install -e .[dev]"
curvlinops = pytest.importorskip("curvlinops", reason=MISSING)
nngeometry = pytest.importorskip("nngeometry", reason=MISSING)

S, T, R = nn.Sequential, nn.Tanh, nn.ReLU
UNEVEN = (3, 2)


def conv() -> nn.Module:
    return seeded(
        lambda: S(
            nn.Conv2d(1, 2, 2, padding=1),
            T(),
            nn.Conv2d(2, 2, 2, stride=2),
            nn.Flatten(),
            nn.Linear(8, 3),
        )
    )


def tokens() -> nn.Module:
    return seeded(lambda: S(nn.Linear(2, 3), T(), nn.Linear(3, 3), Apply(tokens_last)))


def perceptron() -> nn.Module:
    return seeded(lambda: mlp(T, 3, 3, 3))


IMAGES = data(UNEVEN, real(1, 4, 4), labels(3))
SEQUENCES = data(UNEVEN, real(4, 2), labels(3, 4))
VECTORS = data((4, 2), real(3), labels(3))


def peer(name: str, model: nn.Module, loss: Any, batches: Any, **options: Any) -> Tensor:
    """A curvlinops operator as a dense matrix."""
    operator = getattr(curvlinops, f"{name}LinearOperator")
    parameters = list(model.parameters())
    op = operator(model, loss, parameters, batches, check_deterministic=False, **options)
    return op @ torch.eye(sum(p.numel() for p in parameters), dtype=torch.float64)


def factored(name: str, model: nn.Module, loss: Any, batches: Any, **options: Any) -> Tensor:
    options = {"fisher_type": "type-2", "separate_weight_and_bias": False, **options}
    return peer(name, model, loss, batches, **options)


def close(value: Tensor, truth: Tensor) -> None:
    assert relative(value, truth) < 1e-12


# -- curvlinops: agreement ---------------------------------------------------------------------


@pytest.mark.parametrize("matrix", ["GGN", "Hessian", "EF"])
@pytest.mark.parametrize("loss", [CE(), CE(reduction="sum"), CE(label_smoothing=0.2)], ids=str)
def test_exact_matrices(matrix: str, loss: nn.Module) -> None:
    own = {"GGN": cs.ggn, "Hessian": cs.hessian, "EF": cs.empirical_fisher}[matrix]
    value = own(cs.Problem(conv(), loss, IMAGES())).dense()
    close(value, peer(matrix, conv(), loss, IMAGES()))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
def test_kfac_of_convolutions(sharing: str, fisher: str) -> None:
    problem = cs.Problem(conv(), CE(), IMAGES())
    own = cs.kfac(problem, sharing=sharing, fisher="exact" if fisher == "type-2" else fisher)
    other = factored("KFAC", conv(), CE(), IMAGES(), kfac_approx=sharing, fisher_type=fisher)
    close(own.dense(), other)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_kfac_of_tokens(reduction: str) -> None:
    loss = CE(reduction=reduction)
    own = cs.kfac(cs.Problem(tokens(), loss, SEQUENCES()))
    close(own.dense(), factored("KFAC", tokens(), loss, SEQUENCES(), kfac_approx="expand"))


@pytest.mark.parametrize("fisher", ["type-2", "empirical"])
@pytest.mark.parametrize(
    ("loss", "batches"),
    [(MSE(), data((4, 2), real(3), real(3))), (BCE(), data((4, 2), real(3), bits(3)))],
    ids=["MSELoss", "BCEWithLogitsLoss"],
)
def test_kfac_of_other_losses(loss: nn.Module, batches: Any, fisher: str) -> None:
    problem = cs.Problem(perceptron(), loss, batches())
    own = cs.kfac(problem, fisher="exact" if fisher == "type-2" else fisher)
    close(own.dense(), factored("KFAC", perceptron(), loss, batches(), fisher_type=fisher))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_ekfac_of_convolutions(sharing: str) -> None:
    """Where eigenvalues of a factor coincide, its eigenvectors are not determined, nor is EKFAC."""
    batches = data((9, 8), real(1, 4, 4), labels(3))()
    problem = cs.Problem(conv(), CE(), batches)
    own = cs.ekfac(problem, sharing=sharing)
    other = factored("EKFAC", conv(), CE(), batches, kfac_approx=sharing)
    for name, members in own.members.items():
        A = cs.kfac(problem, sharing=sharing).blocks[name].factors["A"]
        gaps = torch.linalg.eigvalsh(A).diff()
        index = own.layout.index(members)
        if float(gaps.min()) > 1e-6:
            assert relative(own.blocks[name].dense(), other[index][:, index]) < 1e-10
        else:  # the mean over all windows of a padded image is the same at every kernel position
            assert (name, sharing) == ("0", "reduce")


# -- curvlinops: where it differs --------------------------------------------------------------


def test_kfac_reduce_of_tokens() -> None:
    """curvlinops sends the roots of all tokens of a sample back together: cross terms remain."""
    loss = CE()
    problem = cs.Problem(tokens(), loss, SEQUENCES())
    own = cs.kfac(problem, sharing="reduce")
    for name, truth in definition.factors(
        tokens(), loss, SEQUENCES(), problem.scale, "reduce"
    ).items():
        close(own.blocks[name].factors["G"], truth.G[0])
    other = factored("KFAC", tokens(), loss, SEQUENCES(), kfac_approx="reduce")
    assert relative(other, own.dense()) == pytest.approx(2.94, abs=0.01)


@pytest.mark.parametrize("matrix", ["GGN", "Hessian"])
@pytest.mark.parametrize("loss", [CE(weight=W3), CE(ignore_index=2)], ids=["weights", "ignored"])
def test_curvlinops_averages_batches_by_their_size(matrix: str, loss: nn.Module) -> None:
    """Its mean weighs the means of batches with their numbers of samples, not of terms."""
    own = {"GGN": cs.ggn, "Hessian": cs.hessian}[matrix]
    batches, model = VECTORS(), perceptron()
    value = own(cs.Problem(model, loss, batches)).dense()
    other = peer(matrix, model, loss, batches)
    assert relative(other, value) > 0.05
    wrong = sum(len(x) / 6 * own(cs.Problem(model, loss, (x, y))).dense() for x, y in batches)
    close(other, wrong)
    if matrix == "Hessian":
        x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
        close(value, dense_hessian(loss(model(x), y), list(model.parameters())))


def test_curvlinops_kfac_of_soft_labels_is_c_times_too_large() -> None:
    batches = data((4, 2), real(3), soft(3))()
    own = cs.kfac(cs.Problem(perceptron(), CE(), batches)).dense()
    close(factored("KFAC", perceptron(), CE(), batches), 3 * own)


# -- nngeometry --------------------------------------------------------------------------------


@pytest.fixture
def float64() -> Iterator[None]:
    """nngeometry makes some of its tensors in the default type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def loader(batches: Any, size: int) -> DataLoader:
    x, y = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    return DataLoader(TensorDataset(x, y), batch_size=size)


@pytest.mark.parametrize("size", [5, 3])
def test_nngeometry_fisher(float64: None, size: int) -> None:
    """The same Fisher and K-FAC, but with ``A`` times ``T sqrt(C - 1)`` and ``G`` divided by it."""
    from nngeometry.object import PMatDense, PMatKFAC

    model = conv()
    options: dict[str, Any] = {"variant": "classif_logits", "device": "cpu"}
    problem = cs.Problem(model, CE(), IMAGES())
    dense = nngeometry.FIM(model, loader(IMAGES(), size), PMatDense, **options)
    close(cs.fisher(problem).dense(), dense.to_torch())
    kfac = nngeometry.FIM(model, loader(IMAGES(), size), PMatKFAC, **options)
    own = cs.kfac(problem)
    positions = {"0": 25, "2": 4, "4": 1}
    for (name, block), (A, G) in zip(own.blocks.items(), kfac.data.values(), strict=True):
        close(torch.kron(block.factors["G"], block.factors["A"]), torch.kron(G, A))
        close(A, positions[name] * 2**0.5 * block.factors["A"])


def test_nngeometry_hessian_sums_batches(float64: None) -> None:
    from nngeometry.object import PMatDense

    model, batches = perceptron(), VECTORS()
    value = cs.hessian(cs.Problem(model, CE(), batches)).dense()

    def theirs(size: int) -> Tensor:
        return nngeometry.Hessian(
            model, loader(batches, size), PMatDense, function=nn.functional.cross_entropy
        ).to_torch()

    close(value, theirs(6))
    for size, factor in ((3, 2.0), (1, 6.0)):
        close(theirs(size), factor * value)
    wrong = sum(cs.hessian(cs.Problem(model, CE(), pair)).dense() for pair in batches)
    close(theirs(4), wrong)
    assert relative(wrong, value) > 0.5
