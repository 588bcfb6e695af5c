"""Products of other libraries, each called as its documentation says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import cases
import torch
from torch import Tensor

Runs = dict[str, Callable[[], Tensor]]


def products(case: cases.Case, vector: Tensor) -> Runs:
    """Those of the libraries that are installed."""
    runs: Runs = {}
    for add in (_curvlinops, _pyhessian, _eigenthings, _nngeometry, _torch_func):
        try:
            add(case, vector, runs)
        except ImportError:
            continue
    return runs


def _curvlinops(case: cases.Case, vector: Tensor, runs: Runs) -> None:
    import curvlinops

    # the loss's own mean is over more terms than samples for pixels and tokens; the time is
    # the same, and so is the matrix for one batch
    for title, kind in (
        ("Hessian", curvlinops.HessianLinearOperator),
        ("GGN", curvlinops.GGNLinearOperator),
    ):
        try:
            operator = kind(
                case.model, case.loss, case.parameters, case.batches[:1], check_deterministic=False
            )
        except Exception as error:
            runs[f"{title}, curvlinops"] = _raising(error)
            continue
        runs[f"{title}, curvlinops"] = lambda op=operator: op @ vector


def _raising(error: Exception) -> Callable[[], Tensor]:
    def run() -> Tensor:
        raise error

    return run


def _pyhessian(case: cases.Case, vector: Tensor, runs: Runs) -> None:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    state: dict[str, Any] = {}

    def run() -> Tensor:
        # it keeps the graph of its one batch from its construction on
        if not state:
            state["own"] = hessian(case.model, case.loss, data=case.batches[0], cuda=vector.is_cuda)
        own = state["own"]
        parts = vector.split([p.numel() for p in own.params])
        v = [x.reshape(p.shape) for x, p in zip(parts, own.params, strict=True)]
        found = hessian_vector_product(own.gradsH, own.params, v)
        return torch.cat([x.reshape(-1) for x in found])

    runs["Hessian, PyHessian (retained)"] = run


def _eigenthings(case: cases.Case, vector: Tensor, runs: Runs) -> None:
    from hessian_eigenthings import GGNOperator, HessianOperator
    from hessian_eigenthings import loss_fns as losses

    options = {"dataloader": case.batches[:1]}
    hessian = HessianOperator(case.model, loss_fn=losses.supervised_loss(case.loss), **options)
    runs["Hessian, hessian-eigenthings"] = lambda: hessian.matvec(vector)
    ggn = GGNOperator(
        case.model,
        forward_fn=losses.supervised_forward,
        loss_of_output_fn=losses.supervised_loss_of_output(case.loss),
        **options,
    )
    runs["GGN, hessian-eigenthings"] = lambda: ggn.matvec(vector)


def _nngeometry(case: cases.Case, vector: Tensor, runs: Runs) -> None:
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM
    from nngeometry.object import PMatImplicit, PVector

    (x, y) = case.batches[0]
    if y.dim() != 1 or y.is_floating_point():
        return  # it knows the Fisher matrix of one label per sample only, which is then the GGN
    model = copy.deepcopy(case.model)  # where it fails it leaves its hooks behind
    layers = LayerCollection.from_model(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), len(x))
    matrix = FIM(model, loader, PMatImplicit, device=str(x.device), layer_collection=layers)
    v = PVector(layer_collection=layers, vector_repr=vector)
    runs["GGN, nngeometry"] = lambda: matrix.mv(v).to_torch()


def _torch_func(case: cases.Case, vector: Tensor, runs: Runs) -> None:
    from torch.func import functional_call, grad, jvp

    x, y = case.batches[0]
    named = {name: p.detach() for name, p in case.model.named_parameters()}
    sizes = [p.numel() for p in named.values()]
    tangents = {
        name: part.reshape(p.shape)
        for (name, p), part in zip(named.items(), vector.split(sizes), strict=True)
    }

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return case.loss(functional_call(case.model, parameters, (x,)), y)

    def run() -> Tensor:
        _, found = jvp(grad(loss), (named,), (tangents,))
        return torch.cat([part.reshape(-1) for part in found.values()])

    runs["Hessian, torch.func (jvp of grad)"] = run
