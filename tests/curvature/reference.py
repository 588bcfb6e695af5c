"""Dense truth of a case by ``torch.autograd``, column by column, on one merged computation.

Nothing here uses the package: all samples go through the model at once (where their shapes
allow it) and through the user's own loss once, so that normalising over batches is put to the test.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_unflatten

from tests.truth import dense_ggn, dense_hessian, flat_grad, jacobian_rows

Batches = list[tuple[Any, Tensor]]


@dataclass(frozen=True)
class Case:
    """A model, a loss and data; ``options`` go to ``Problem``, ``load`` hands it the batches.

    ``terms(outputs, targets)`` gives the terms of a loss that is a plain callable, samples first;
    ``merge=False`` where samples of different batches must not meet in the model; ``truth`` takes
    the model to one that computes the same in another way.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Any
    batches: Callable[[], Batches]
    options: Mapping[str, Any] = field(default_factory=dict)
    load: Callable[[Batches], Any] | None = None
    terms: Callable[[Tensor, Tensor], Tensor] | None = None
    merge: bool = True
    truth: Callable[[nn.Module], nn.Module] | None = None

    def __str__(self) -> str:
        return self.name


def cat(parts: list[Any]) -> Any:
    """Join nested inputs along the sample axis."""
    leaves = [tree_flatten(part)[0] for part in parts]
    joined = [torch.cat(column) for column in zip(*leaves, strict=True)]
    return tree_unflatten(joined, tree_flatten(parts[0])[1])


def same_shapes(parts: list[Any]) -> bool:
    return len({tuple(leaf.shape[1:] for leaf in tree_flatten(p)[0]) for p in parts}) == 1


def likelihood(loss: Any) -> str | None:
    if isinstance(loss, functools.partial):
        loss = loss.func
    known = {
        "softmax": (nn.CrossEntropyLoss, nn.NLLLoss, F.cross_entropy, F.nll_loss),
        "normal": (nn.MSELoss, F.mse_loss),
        "bernoulli": (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits),
    }
    for name, losses in known.items():
        if loss in losses or type(loss) in losses:
            return name
    return None


class Reference:
    """All exact quantities of a case; parameters restricted to ``names`` in model order."""

    def __init__(self, case: Case, names: list[str]) -> None:
        self.case, self.names = case, names
        self.model = case.model() if case.truth is None else case.truth(case.model())
        if case.options.get("batchnorm") == "batch":
            for module in self.model.modules():
                module.training = isinstance(module, nn.modules.batchnorm._BatchNorm)
        self.params = [dict(self.model.named_parameters())[n] for n in names]
        self.loss = case.loss
        self.outputs, self.targets, self.owner = self._merged()
        self.value = self._loss(self.outputs)

    # -- the objective ---------------------------------------------------------------------------

    def _forward(self, inputs: Any) -> Tensor:
        forward = self.case.options.get("forward")
        with sdpa_kernel(SDPBackend.MATH):  # the others cannot be differentiated twice
            return self.model(inputs) if forward is None else forward(self.model, inputs)

    def _merged(self) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs and targets of all samples, and the sample that each row belongs to."""
        batches = self.case.batches()
        inputs, targets = [x for x, _ in batches], [y for _, y in batches]
        sizes = [len(tree_flatten(x)[0][0]) for x in inputs]
        if self.case.merge and same_shapes(inputs) and same_shapes(targets):
            outputs, target = self._forward(cat(inputs)), torch.cat(targets)
            fold = outputs.shape[0] // sum(sizes)
            return outputs, target, torch.arange(sum(sizes)).repeat_interleave(fold)
        parts, labels, owner, start = [], [], [], 0
        for x, y, n in zip(inputs, targets, sizes, strict=True):
            z = self._forward(x)
            if likelihood(self.loss) == "softmax":  # rows of classes: lengths may differ
                labels.append(y.reshape(-1) if y.ndim < z.ndim else _rows(y))
                z = _rows(z)
            else:
                labels.append(y)
            parts.append(z)
            owner.append(start + torch.arange(n).repeat_interleave(z.shape[0] // n))
            start += n
        return torch.cat(parts), torch.cat(labels), torch.cat(owner)

    def _loss(self, outputs: Tensor) -> Tensor:
        if likelihood(self.loss) is None or isinstance(self.loss, nn.Module):
            return self.loss(outputs, self.targets)
        reduction = self.case.options.get("reduction")
        return self.loss(outputs, self.targets, **({"reduction": reduction} if reduction else {}))

    def curvature_loss(self, outputs: Tensor) -> Tensor:
        """The loss whose Hessian in the outputs the GGN uses: log-probabilities count as logits."""
        function = self.loss.func if isinstance(self.loss, functools.partial) else self.loss
        if not isinstance(self.loss, nn.NLLLoss) and function is not F.nll_loss:
            return self._loss(outputs)
        old = self.loss if isinstance(self.loss, nn.NLLLoss) else nn.NLLLoss()
        return nn.CrossEntropyLoss(
            weight=old.weight, ignore_index=old.ignore_index, reduction=old.reduction
        )(outputs, self.targets)

    # -- matrices --------------------------------------------------------------------------------

    @functools.cached_property
    def gradient(self) -> Tensor:
        return flat_grad(self.value, self.params, retain_graph=True)

    @functools.cached_property
    def hessian(self) -> Tensor:
        return dense_hessian(self.value, self.params)

    @functools.cached_property
    def jacobian(self) -> Tensor:
        return jacobian_rows(self.outputs, self.params)

    @functools.cached_property
    def ggn(self) -> Tensor:
        return dense_ggn(self.curvature_loss, self.outputs, self.params)

    @functools.cached_property
    def scale(self) -> float:
        """``1/M``, from the loss itself: the mean of a loss divided by its sum."""
        summed = self._summed()
        if summed is None:
            return 1.0
        return float((self.value / summed(self.outputs, self.targets)).detach())

    def _reduced(self, reduction: str) -> Any:
        if isinstance(self.loss, nn.Module):
            twin = copy.copy(self.loss)
            twin.reduction = reduction
            return twin
        function, options = self.loss, {}
        if isinstance(self.loss, functools.partial):
            function, options = self.loss.func, self.loss.keywords
        return functools.partial(function, **{**options, "reduction": reduction})

    def _summed(self) -> Any:
        if self.case.terms is not None:
            terms = self.case.terms
            return lambda z, y: terms(z, y).sum()
        return self._reduced("sum")

    def term_losses(self) -> tuple[Tensor, Tensor]:
        """Unnormalised terms ``[rows, ...]`` and the weight ``c`` of each."""
        z, y = self.outputs, self.targets
        if self.case.terms is not None:
            terms = self.case.terms(z, y)
            return terms, torch.ones_like(terms)
        terms = self._reduced("none")(z, y)
        if getattr(self.loss, "reduction", None) == "batchmean":
            terms = terms.sum(1)
            return terms, torch.ones_like(terms)
        return terms, term_weights(self.loss, z, y).reshape(terms.shape)

    @property
    def term_count(self) -> int:
        return self.term_losses()[0].numel()

    def empirical_fisher(self, per: str) -> Tensor:
        terms, c = self.term_losses()
        scaled = torch.where(c > 0, terms / c.clamp_min(1e-300).sqrt(), torch.zeros_like(terms))
        rows = scaled.reshape(len(self.owner), -1)
        if per == "sample":
            parts = [rows[self.owner == n].sum() for n in range(int(self.owner.max()) + 1)]
        else:
            parts = list(rows.reshape(-1))
        g = torch.stack([flat_grad(part, self.params, retain_graph=True) for part in parts])
        return self.scale * g.T @ g

    def enumerated_fisher(self) -> Tensor:
        """``(1/M) sum_m c_m sum_y p(y) grad log p(y) grad log p(y)^T``, label by label."""
        kind = likelihood(self.loss)
        z = self.outputs
        c = term_weights(self.loss, z, self.targets)
        total = torch.zeros_like(self.ggn)
        if kind == "softmax":
            logp = _rows(z).log_softmax(-1)
            weights = c.reshape(-1)
            for m in range(logp.shape[0]):
                for label in range(logp.shape[1]):
                    g = flat_grad(logp[m, label], self.params, retain_graph=True)
                    total += weights[m] * logp[m, label].exp().detach() * torch.outer(g, g)
        elif kind == "bernoulli":
            for value, weight in zip(z.reshape(-1), c.reshape(-1), strict=True):
                for logp in (F.logsigmoid(value), F.logsigmoid(-value)):
                    g = flat_grad(logp, self.params, retain_graph=True)
                    total += weight * logp.exp().detach() * torch.outer(g, g)
        else:
            # y = z + e with e normal of variance 1/2: Gauss-Hermite nodes are exact for squares
            for value in z.reshape(-1):
                for node in (-1.0, 1.0):
                    logp = -((value.detach() + node * 0.5**0.5 - value) ** 2)
                    g = flat_grad(logp, self.params, retain_graph=True)
                    total += 0.5 * torch.outer(g, g)
        return self.scale * total


def _rows(outputs: Tensor) -> Tensor:
    """``[N, C, ...] -> [rows, C]``."""
    return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])


def term_weights(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """``c_m``, written out: class weights, smoothing, ignored targets, ``pos_weight``."""
    options: dict[str, Any] = {}
    if isinstance(loss, functools.partial):
        options = dict(loss.keywords)
    elif isinstance(loss, nn.Module):
        options = {
            name: getattr(loss, name)
            for name in ("weight", "pos_weight", "ignore_index", "label_smoothing")
            if hasattr(loss, name)
        }
    kind = likelihood(loss)
    if kind == "softmax":
        classes = outputs.shape[1]
        weight = options.get("weight")
        weight = torch.ones(classes).to(outputs) if weight is None else weight.to(outputs)
        smooth = options.get("label_smoothing", 0.0)
        c = []
        soft = targets.is_floating_point()
        for target in _rows(targets) if soft else targets.reshape(-1):
            if soft:
                q = target.to(outputs)
            elif int(target) == options.get("ignore_index", -100):
                c.append(outputs.new_zeros(()))
                continue
            else:
                q = torch.eye(classes).to(outputs)[int(target)]
            q = (1 - smooth) * q + smooth / classes
            c.append((weight * q).sum())
        return torch.stack(c)
    c = torch.ones_like(outputs)
    if kind == "bernoulli":
        if options.get("pos_weight") is not None:
            c = torch.where(targets > 0, c * options["pos_weight"], c)
        if options.get("weight") is not None:
            c = c * options["weight"]
    return c
