"""What a loss averages over, and its curvature in the model's outputs.

A loss is seen as ``f = (1/M) sum_m l_m``. A :class:`Loss` gives the unnormalised sum of its terms
``l_m``, the normaliser ``M`` that the loss's own mean divides by, and (where the loss is the
negative log-likelihood of a distribution) what Gauss-Newton and Fisher matrices need:

* ``roots``: vectors ``u`` with ``sum u u^T = d^2 l / dz^2`` for the terms of each sample,
* ``sampled``: gradients of ``-log p(y)`` at labels drawn from the model,
* ``weights``: ``c_m``, the weight of each term (class weight, ``pos_weight``, ...).

All of them are cotangents: tensors of the outputs' shape that one backward pass turns into
gradients in the parameters, for all samples at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TargetError, UnsupportedLossError


class Loss(ABC):
    """A loss that curvscope can normalise exactly over any split of the data into batches."""

    name: str
    reduction: str = "mean"
    likelihood: str | None = None  # the distribution whose negative log-likelihood the loss is
    twice_differentiable: bool = True

    @abstractmethod
    def total(self, outputs: Tensor, targets: Any) -> Tensor:
        """Unnormalised sum of all terms, a differentiable scalar."""

    @abstractmethod
    def count(self, outputs: Tensor, targets: Any) -> float:
        """The batch's share of the normaliser ``M``, whatever the reduction."""

    def check(self, outputs: Tensor, targets: Any) -> None:  # noqa: B027 (nothing to check)
        """Raise ``TargetError`` where targets do not fit the outputs."""

    def terms(self, outputs: Tensor, samples: int) -> Tensor:
        """View outputs as ``[N, T, C]``: samples, terms per sample, outputs coupled in a term.

        Only called on outputs whose leading axis is ``samples`` times an integer.
        """
        return outputs.reshape(samples, -1, 1)

    def unterms(self, cotangents: Tensor, outputs: Tensor) -> Tensor:
        """Inverse of :meth:`terms` for a tensor of the outputs' shape."""
        return cotangents.reshape(outputs.shape)

    def hessian_product(self, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor | None:
        """``(d^2 total / dz^2) vectors`` in closed form; ``None`` where there is none."""
        return None

    # -- likelihoods only ------------------------------------------------------------------------

    def weights(self, outputs: Tensor, targets: Any, samples: int) -> Tensor:
        """``c_m`` as ``[N, T]``: by how much the term's Hessian exceeds the likelihood's."""
        return torch.ones_like(self.terms(outputs, samples)[..., 0])

    def term_roots(self, terms: Tensor) -> Tensor:
        """``U [N, T, C, R]`` with ``U U^T`` the Hessian of ``-log p`` in each term's outputs."""
        raise UnsupportedLossError(self.no_likelihood("Its Fisher"))

    def term_scores(self, terms: Tensor, generator: torch.Generator) -> Tensor:
        """``[N, T, C]``: the gradient of ``-log p(y)`` at one label drawn from the model."""
        raise UnsupportedLossError(self.no_likelihood("Its Fisher"))

    def no_likelihood(self, what: str) -> str:
        return (
            f"{self.name} is not the negative log-likelihood of a distribution that curvscope "
            f"knows. {what} is not defined; use cs.ggn or cs.hessian, or one of CrossEntropyLoss, "
            "NLLLoss, MSELoss, BCEWithLogitsLoss."
        )


def _accumulating(x: Tensor) -> Tensor:
    """At least in float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class CrossEntropy(Loss):
    """``CrossEntropyLoss`` and ``NLLLoss`` (on log-probabilities): softmax likelihood.

    Class indices (class weights, ``ignore_index``, label smoothing) or class probabilities.
    ``M`` is the sum of class weights of the targets that are not ignored; for probabilities, the
    number of terms. Sources: the ``torch.nn.CrossEntropyLoss`` documentation.
    """

    likelihood = "softmax"

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        log_probabilities: bool = False,
    ) -> None:
        self.name = "NLLLoss" if log_probabilities else "CrossEntropyLoss"
        self.weight = weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.log_probabilities = log_probabilities

    def _weight(self, outputs: Tensor) -> Tensor | None:
        return None if self.weight is None else self.weight.to(outputs)

    def total(self, outputs: Tensor, targets: Any) -> Tensor:
        return F.cross_entropy(
            outputs,
            targets,
            weight=self._weight(outputs),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            reduction="sum",
        )

    def _soft(self, targets: Tensor) -> bool:
        return targets.is_floating_point()

    def check(self, outputs: Tensor, targets: Any) -> None:
        if not isinstance(targets, Tensor):
            raise TargetError(
                f"{self.name} needs targets as one tensor, not {type(targets).__name__}; "
                "take it out of the batch with unpack=."
            )
        if outputs.ndim < 2:
            raise TargetError(
                f"{self.name} needs outputs [N, C, ...], but the model returned "
                f"{list(outputs.shape)}; add the batch axis in forward=."
            )
        classes = outputs.shape[1]
        if self.weight is not None and self.weight.numel() != classes:
            raise TargetError(
                f"{self.name} has {self.weight.numel()} class weights for outputs with {classes} "
                "classes; give one weight per class."
            )
        if self._soft(targets) and not self.log_probabilities:
            if targets.shape != outputs.shape:
                raise TargetError(
                    f"Class probabilities {list(targets.shape)} must have the shape of the outputs "
                    f"{list(outputs.shape)}; for class indices use an integer dtype."
                )
            if bool((targets < 0).any()):
                raise TargetError(
                    f"{self.name} got negative class probabilities; make them non-negative, for "
                    "instance with softmax."
                )
            return
        if targets.dtype in (torch.bool,) or targets.is_floating_point() or targets.is_complex():
            raise TargetError(
                f"{self.name} needs class indices (int64), not {targets.dtype}; "
                "convert with targets.long()."
            )
        expected = (outputs.shape[0], *outputs.shape[2:])
        if tuple(targets.shape) != expected:
            raise TargetError(
                f"Targets of shape {list(targets.shape)} do not fit outputs "
                f"{list(outputs.shape)}: expected {list(expected)} (outputs are [N, C, ...])."
            )
        valid = targets[targets != self.ignore_index]
        if valid.numel() and not (int(valid.min()) >= 0 and int(valid.max()) < classes):
            raise TargetError(
                f"Targets lie in [{int(valid.min())}, {int(valid.max())}], but the outputs have "
                f"{classes} classes (0 to {classes - 1}); check the labels or ignore_index="
                f"{self.ignore_index}."
            )
        if self.log_probabilities:
            mass = torch.logsumexp(outputs.detach(), 1).abs().max() if outputs.numel() else 0.0
            if float(mass) > 1e-3:
                raise UnsupportedLossError(
                    "NLLLoss needs log-probabilities, but exp(outputs) sums to "
                    f"exp({float(mass):.3g}) instead of 1 over the classes. End the model with "
                    "LogSoftmax, or use CrossEntropyLoss on the logits."
                )

    def _distribution(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Smoothed target distribution with the classes last; zero where ignored."""
        classes = outputs.shape[1]
        if self._soft(targets):
            probabilities = targets.movedim(1, -1).to(outputs)
            valid = torch.ones_like(probabilities[..., 0])
        else:
            keep = targets != self.ignore_index
            safe = torch.where(keep, targets, torch.zeros_like(targets)).long()
            probabilities = F.one_hot(safe, classes).to(outputs)
            valid = keep.to(outputs)
        smooth = self.label_smoothing
        probabilities = (1 - smooth) * probabilities + smooth / classes
        return probabilities * valid.unsqueeze(-1)

    def count(self, outputs: Tensor, targets: Any) -> float:
        if self._soft(targets):
            return float(targets.numel() // targets.shape[1])
        keep = targets != self.ignore_index
        if self.weight is None:
            return float(keep.sum())
        return float(self.weight.double().to(targets.device)[targets[keep].long()].sum())

    def weights(self, outputs: Tensor, targets: Any, samples: int) -> Tensor:
        distribution = self._distribution(outputs.detach(), targets)
        weight = self._weight(outputs)
        kappa = (distribution if weight is None else distribution * weight).sum(-1)
        return kappa.reshape(samples, -1)

    def hessian_product(self, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor:
        """``c_m (diag p - p p^T) v`` for every term (its weight as in :meth:`weights`)."""
        v, z = _accumulating(vectors), _accumulating(outputs)
        p = z.softmax(1)
        if self.weight is None and not self._soft(targets):
            kappa = (targets != self.ignore_index).to(z)  # smoothing keeps the sum of one
        else:
            distribution = self._distribution(z, targets)
            weight = self._weight(z)
            kappa = (distribution if weight is None else distribution * weight).sum(-1)
        pv = p * v
        return (
            torch.addcmul(pv, p, pv.sum(1, keepdim=True), value=-1)
            .mul_(kappa.unsqueeze(1))
            .to(vectors.dtype)
        )

    def terms(self, outputs: Tensor, samples: int) -> Tensor:
        return outputs.movedim(1, -1).reshape(samples, -1, outputs.shape[1])

    def unterms(self, cotangents: Tensor, outputs: Tensor) -> Tensor:
        classes_last = outputs.movedim(1, -1).shape
        return cotangents.reshape(classes_last).movedim(-1, 1)

    def term_roots(self, terms: Tensor) -> Tensor:
        # one column per label y: sqrt(p_y) (p - e_y), whose outer products sum to diag p - p p^T
        p = terms.softmax(-1)
        root = p.sqrt()
        return p.unsqueeze(-1) * root.unsqueeze(-2) - torch.diag_embed(root)

    def term_scores(self, terms: Tensor, generator: torch.Generator) -> Tensor:
        p = terms.softmax(-1)
        labels = torch.multinomial(
            p.reshape(-1, p.shape[-1]).double().cpu(), 1, generator=generator
        ).to(p.device)
        hot = F.one_hot(labels.reshape(p.shape[:-1]), p.shape[-1])
        return p - hot.to(p)


class _Elementwise(Loss):
    """Losses whose terms are the elements of the outputs."""

    def check(self, outputs: Tensor, targets: Any) -> None:
        if not isinstance(targets, Tensor) or targets.shape != outputs.shape:
            found = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
            raise TargetError(
                f"{self.name} needs targets of the outputs' shape {list(outputs.shape)}, not "
                f"{found}: torch would broadcast them silently. Reshape them in unpack=."
            )

    def count(self, outputs: Tensor, targets: Any) -> float:
        return float(outputs.numel())


class SquaredError(_Elementwise):
    """``MSELoss``: terms ``(z - y)^2``, the normal distribution with variance 1/2."""

    name = "MSELoss"
    likelihood = "normal with variance 1/2"

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = reduction

    def total(self, outputs: Tensor, targets: Any) -> Tensor:
        return F.mse_loss(outputs, targets.to(outputs.dtype), reduction="sum")

    def hessian_product(self, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor:
        """``2 v``."""
        return 2 * vectors

    def term_roots(self, terms: Tensor) -> Tensor:
        return torch.full_like(terms, math.sqrt(2.0)).unsqueeze(-1)

    def term_scores(self, terms: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(terms.shape, generator=generator, dtype=torch.float64)
        return (math.sqrt(2.0) * noise).to(terms)


class BinaryCrossEntropy(_Elementwise):
    """``BCEWithLogitsLoss``: independent Bernoulli distributions; ``weight`` and ``pos_weight``."""

    name = "BCEWithLogitsLoss"
    likelihood = "Bernoulli"

    def __init__(
        self,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        self.weight, self.pos_weight, self.reduction = weight, pos_weight, reduction

    def total(self, outputs: Tensor, targets: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(
            outputs,
            targets.to(outputs.dtype),
            weight=None if self.weight is None else self.weight.to(outputs),
            pos_weight=None if self.pos_weight is None else self.pos_weight.to(outputs),
            reduction="sum",
        )

    def check(self, outputs: Tensor, targets: Any) -> None:
        super().check(outputs, targets)
        if targets.numel() and not (0 <= float(targets.min()) <= float(targets.max()) <= 1):
            raise TargetError(f"{self.name} needs targets between 0 and 1.")
        # a weight that spans the batch axis belongs to one batch only
        spans = self.weight is not None and self.weight.ndim >= outputs.ndim > 0
        if self.weight is not None and spans and self.weight.shape[0] != 1:
            raise UnsupportedLossError(
                f"{self.name} has a weight of shape {list(self.weight.shape)}, one per sample "
                "of a fixed batch, so the loss cannot be taken over any split into batches. "
                "Use a weight that broadcasts over samples, or put the weights into the data "
                "and give a callable loss with reduction=."
            )

    def weights(self, outputs: Tensor, targets: Any, samples: int) -> Tensor:
        return self._term_weights(outputs, targets).reshape(samples, -1)

    def _term_weights(self, outputs: Tensor, targets: Any) -> Tensor:
        """``c_m`` in the outputs' shape."""
        y = targets.to(outputs)
        c = torch.ones_like(y)
        if self.pos_weight is not None:
            c = y * self.pos_weight.to(outputs) + (1 - y)
        if self.weight is not None:
            c = c * self.weight.to(outputs)
        return c

    def hessian_product(self, outputs: Tensor, targets: Any, vectors: Tensor) -> Tensor:
        """``c_m p (1 - p) v`` for every term (its weight as in :meth:`weights`)."""
        z = _accumulating(outputs)
        p = z.sigmoid()
        product = p * (1 - p) * _accumulating(vectors)
        if self.weight is not None or self.pos_weight is not None:
            product = product * self._term_weights(z, targets)
        return product.to(vectors.dtype)

    def term_roots(self, terms: Tensor) -> Tensor:
        p = terms.sigmoid()
        return (p * (1 - p)).sqrt().unsqueeze(-1)

    def term_scores(self, terms: Tensor, generator: torch.Generator) -> Tensor:
        p = terms.sigmoid()
        uniform = torch.rand(p.shape, generator=generator, dtype=torch.float64).to(p.device)
        return p - (uniform < p).to(p)


class Generic(Loss):
    """Any other loss: its value, its normaliser, and its Hessian in the outputs by autograd."""

    def __init__(
        self,
        name: str,
        total: Callable[[Any, Any], Tensor],
        count: Callable[[Any, Any], float],
        reduction: str,
        check: Callable[[Any, Any], None] | None = None,
        term: str | None = None,
    ) -> None:
        self.name, self._total, self._count, self.reduction = name, total, count, reduction
        self._check, self.term = check, term

    def terms(self, outputs: Tensor, samples: int) -> Tensor:
        """Terms are entries of the outputs or rows of them (``term="element"`` or ``"row"``)."""
        if self.term == "element":
            return super().terms(outputs, samples)
        if self.term == "row":
            return outputs.reshape(samples, outputs.shape[0] // samples, -1)
        raise UnsupportedLossError(
            f"The loss {self.name!r} does not say what its terms are, so nothing can be taken per "
            "term; use per='sample'."
        )

    def total(self, outputs: Tensor, targets: Any) -> Tensor:
        value = self._total(outputs, targets)
        wanted = torch.is_grad_enabled() and outputs.requires_grad
        if not wanted or not isinstance(value, Tensor) or value.requires_grad:
            return value
        if bool((value == 0).all()):  # a batch in which nothing counts
            return value + 0.0 * outputs.sum()
        raise UnsupportedLossError(
            f"The value of the loss {self.name} does not depend on the outputs as far as autograd "
            "can tell: compute it with torch from the outputs, without detach(), item(), "
            "torch.no_grad() or NumPy; where it is constant on purpose, add 0 * outputs.sum()."
        )

    def count(self, outputs: Tensor, targets: Any) -> float:
        return self._count(outputs, targets)

    def check(self, outputs: Tensor, targets: Any) -> None:
        if self._check is not None:
            self._check(outputs, targets)
