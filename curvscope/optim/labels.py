"""The distribution of the labels behind a loss, read from its autograd graph.

A loss that is a sum of negative log-likelihoods ends in nodes that say which distribution it is:
``LogSoftmax`` (under whatever is linear in the log-probabilities: ``NllLoss``, soft targets, label
smoothing, ``KlDiv``), ``MseLoss``, ``BinaryCrossEntropyWithLogits``, or ``BinaryCrossEntropy`` of a
sigmoid. The gradient of the loss in such a node's output gives the weight of every term: reduction,
class weights, ignored targets, gradient accumulation are all in it. Only the loss's own part of the
graph is visited, because the search passes through linear nodes only.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from ..errors import OptionError, UnsupportedLossError
from ..problem.losses import BinaryCrossEntropy, CrossEntropy, Loss, SquaredError
from ..problem.recognise import recognise

STRINGS = ("categorical", "bernoulli", "normal")
# fmt: off
_LINEAR = frozenset((
    "Add", "Sub", "Neg", "Mul", "Div", "Sum", "Mean", "Dot", "KlDiv", "NllLoss", "NllLoss2D",
    "View", "ReshapeAlias", "UnsafeView", "Unsqueeze", "Squeeze", "Transpose", "Permute", "T",
    "ToCopy", "Clone", "Alias", "Select", "Slice", "Index", "IndexSelect", "Gather", "Stack", "Cat",
    "Expand", "Split", "SplitWithSizes", "MaskedFill", "MaskedSelect", "Flatten", "Where",
    "AsStrided",
))
_PICKING = frozenset(("Index", "IndexSelect", "MaskedSelect", "Gather", "Cat", "Stack"))
_MOVING = frozenset(("Transpose", "Permute", "T", "Slice", "Select"))
_RESHAPING = frozenset(("View", "ReshapeAlias", "UnsafeView"))
_KEEPING = frozenset(("Clone", "Alias", "ToCopy", "Unsqueeze", "Squeeze", "Mm"))
# fmt: on
_BACKWARD = ("self", "gradient", "retain_graph", "create_graph", "inputs")
_REDUCTIONS = {0: "none", 1: "mean", 2: "sum"}


@dataclass(eq=False)
class Head:
    """Terms of a loss with one distribution.

    ``edge`` is where their outputs are in the graph, ``z`` ``[R, C]`` the outputs of the R terms,
    ``weights`` ``[R]`` by how much each term's negative log-likelihood enters the loss, ``restore``
    brings a cotangent ``[R, C]`` to the outputs' shape.
    """

    edge: GradientEdge
    loss: Loss
    z: Tensor
    weights: Tensor
    restore: Callable[[Tensor], Tensor]

    def sampled(self, generator: torch.Generator) -> Tensor:
        """The cotangent of labels drawn from the model, one per term."""
        scores = self.loss.term_scores(self.z.unsqueeze(0), generator).squeeze(0)
        return self.restore(scores * self.weights.sqrt().unsqueeze(-1))

    def exact(self, samples: int) -> Iterator[Tensor]:
        """Cotangents whose gradients' outer products sum to the Fisher matrix.

        Terms of different samples share a pass; a sample's own terms do not. Where it is not
        known whose they are, every term has its own pass.
        """
        roots = self.loss.term_roots(self.z.unsqueeze(0)).squeeze(0)  # [R, C, K]
        roots = roots * self.weights.sqrt()[:, None, None]
        rows = len(self.z)
        known = samples and rows % samples == 0 and _sample_by_sample(self.edge.node, samples)
        own = rows // samples if known else rows
        term = torch.arange(len(self.z), device=self.z.device) % own
        for t in range(own):
            mine = (term == t).to(roots).unsqueeze(-1)
            for k in range(roots.shape[-1]):
                yield self.restore(roots[..., k] * mine)


class BackwardWatch(TorchFunctionMode):
    """Hands every loss to ``receive`` when ``loss.backward()`` is called, with its graph alive.

    ``receive(loss, again)``: the graph stays, so that another loss may come back to it.
    """

    def __init__(self, receive: Callable[[Tensor, bool], None]) -> None:
        super().__init__()
        self._receive = receive
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.backward and args[0].numel() == 1:
            self.calls += 1
            given = {**dict(zip(_BACKWARD, args, strict=False)), **(kwargs or {})}
            again = given.get("retain_graph")
            self._receive(args[0], bool(given.get("create_graph") if again is None else again))
        return func(*args, **(kwargs or {}))


def read_loss(loss: Tensor) -> list[Head]:
    """The heads of a loss whose graph is alive; raises ``UnsupportedLossError`` without any."""
    root = loss.grad_fn
    nodes, others = _loss_nodes(root) if root is not None else ([], [])
    heads = []
    if nodes:
        edges = [GradientEdge(node, 0) for node in nodes]
        upstream = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        heads = [_head(n, u.detach()) for n, u in zip(nodes, upstream) if u is not None]
    if not heads or any(h is None for h in heads):
        raise UnsupportedLossError(
            "K-FAC cannot read the distribution of the labels from the returned loss (its "
            f"autograd node is {root.name() if root is not None else 'none'}): pass "
            "loss=nn.CrossEntropyLoss(), nn.MSELoss(), nn.BCEWithLogitsLoss() or one of "
            f"{', '.join(map(repr, STRINGS))}, or use fisher='empirical'."
        )
    shared = _behind(nodes) if others else set()
    unread = sorted({_name(node) for node in others if shared & _behind([node])})
    if unread:
        warnings.warn(
            "K-FAC reads a part of the loss only: the terms that end in the autograd nodes "
            f"{', '.join(unread)} are no log-likelihood that it knows, so its factors are without "
            "them. Use the losses of torch.nn for all terms that have a distribution, or "
            "fisher='empirical'; for a penalty this is right.",
            stacklevel=2,
        )
    return [head for head in heads if head is not None]


def head_of_outputs(outputs: Tensor, loss: Loss | str) -> Head:
    """The head of a model's outputs for a loss that the user has named, summed over its terms."""
    edge, z = get_gradient_edge(outputs), outputs.detach()
    if isinstance(loss, str):
        kinds: dict[str, Loss] = {
            "categorical": CrossEntropy(),
            "bernoulli": BinaryCrossEntropy(),
            "normal": SquaredError(),
        }
        kind = kinds[loss]
    else:
        kind = loss
    shape, z = z.shape, with_samples(kind, z)
    terms = kind.terms(z, 1).squeeze(0)
    # half the squared error is the normal distribution with variance 1
    weights = terms.new_full((len(terms),), 0.5 if loss == "normal" else 1.0)

    def restore(cotangent: Tensor) -> Tensor:
        return kind.unterms(cotangent.unsqueeze(0), z).reshape(shape)

    return Head(edge, kind, terms, weights, restore)


def with_samples(loss: Loss | str, z: Tensor) -> Tensor:
    """Scores of one sample without an axis for it, as a batch of one."""
    return z.unsqueeze(0) if z.ndim == 1 and isinstance(loss, CrossEntropy) else z


def named_loss(loss: Any) -> Loss | str | None:
    """Check ``loss=``: a string, a loss of torch, or ``None``."""
    if loss is None:
        return None
    if isinstance(loss, str):
        if loss not in STRINGS:
            raise OptionError(
                f"loss={loss!r} is not one of {', '.join(map(repr, STRINGS))}, nor a torch.nn loss."
            )
        return loss
    found = loss if isinstance(loss, Loss) else recognise(loss)
    if found.likelihood is None:
        raise UnsupportedLossError(found.no_likelihood("Its Fisher"))
    if getattr(found, "weight", None) is not None or getattr(found, "pos_weight", None) is not None:
        raise UnsupportedLossError(
            f"The weights of {found.name} belong to targets, which K-FAC does not see with loss=. "
            "Leave loss= out, so that they are read from the loss that the closure returns."
        )
    return found


def _behind(nodes: Sequence[Any]) -> set[Any]:
    """All that the nodes depend on, but for the parameters."""
    seen: set[Any] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if (
            node is not None
            and node not in seen
            and _name(node) != "torch::autograd::AccumulateGrad"
        ):
            seen.add(node)
            stack += [below for below, _ in node.next_functions]
    return seen


def _loss_nodes(root: Any) -> tuple[list[Any], list[Any]]:
    """The topmost nodes that end a log-likelihood, reached through linear nodes only, and others.

    The others are not linear and end no log-likelihood that is known.
    """
    found: list[Any] = []
    others: list[Any] = []
    seen: set[Any] = set()
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = _name(node)
        below = [n for n, _ in node.next_functions if n is not None]
        if name in ("LogSoftmax", "MseLoss", "BinaryCrossEntropyWithLogits", "BinaryCrossEntropy"):
            found.append(node)
        elif name in ("NllLoss", "NllLoss2D"):
            ends = _loss_nodes(below[0])[0] if below else []
            inner = [n for n in ends if _name(n) == "LogSoftmax"]
            found += inner or ([node] if below else [])
        elif name in _LINEAR and not (name in ("Mul", "Div", "Dot") and len(below) > 1):
            stack += below
        else:
            others.append(node)
    return list(dict.fromkeys(found)), others


def _head(node: Any, upstream: Tensor) -> Head | None:
    name = _name(node)
    if name == "LogSoftmax":
        edge = GradientEdge(*node.next_functions[0])
        return _categorical(edge, node._saved_result, node._saved_dim, -upstream)
    if name in ("NllLoss", "NllLoss2D"):  # on log-probabilities of another origin
        edge = GradientEdge(*node.next_functions[0])
        logp = node._saved_self
        w = _nll_weights(node, upstream)
        return _categorical(edge, logp, 1, None, w)
    if name == "BinaryCrossEntropy":
        below = node.next_functions[0][0]
        if below is None or _name(below) != "Sigmoid":
            return None
        edge, z = GradientEdge(*below.next_functions[0]), torch.logit(below._saved_result)
    else:
        if node.next_functions[0][0] is None:
            return None
        edge, z = GradientEdge(*node.next_functions[0]), node._saved_self
    z = z.detach()
    w = upstream.expand_as(z) if upstream.ndim else upstream.expand(z.shape)
    if _REDUCTIONS[node._saved_reduction] == "mean":
        w = w / max(z.numel(), 1)
    loss: Loss = SquaredError()
    if name != "MseLoss":
        loss = BinaryCrossEntropy()
        y, weight = node._saved_target, node._saved_weight
        positive = getattr(node, "_saved_pos_weight", None)
        w = w if positive is None else w * (y * positive + (1 - y))
        w = w if weight is None else w * weight
    return Head(edge, loss, z.reshape(-1, 1), _checked(w.reshape(-1)), lambda c: c.reshape(z.shape))


def _categorical(
    edge: GradientEdge, logp: Tensor, dim: int, minus: Tensor | None, weights: Tensor | None = None
) -> Head:
    logp = logp.detach()
    dim = _signed(dim)
    moved = logp.movedim(dim, -1)
    if weights is None:
        assert minus is not None
        weights = minus.sum(dim)  # the loss is - sum w log p, so this is the term's whole weight

    def restore(cotangent: Tensor) -> Tensor:
        return cotangent.reshape(moved.shape).movedim(-1, dim)

    terms = moved.reshape(-1, moved.shape[-1])
    return Head(edge, CrossEntropy(), terms, _checked(weights.reshape(-1)), restore)


def _nll_weights(node: Any, upstream: Tensor) -> Tensor:
    """The weight of every term of ``nll_loss``."""
    target, ignore = node._saved_target, _signed(node._saved_ignore_index)
    keep = target != ignore
    weight = node._saved_weight
    safe = torch.where(keep, target, 0)
    own = torch.ones_like(safe, dtype=upstream.dtype) if weight is None else weight[safe]
    own = own * keep
    if _REDUCTIONS[node._saved_reduction] == "mean":
        own = own / own.sum()
    return own * upstream


def _sample_by_sample(node: Any, samples: int) -> bool:
    """Whether the rows of a node's output are all there, in the order of the samples.

    They are not if they were picked (by a mask) or if the first axis was exchanged for another on
    the way from the layer that computed them; the last Linear may be on the way as well.
    """
    while node is not None:
        name, below = _name(node), node.next_functions
        if name in _PICKING or (name in _MOVING and _moves_first(node)):
            return False
        shape: Any = getattr(node, "_saved_self_sym_sizes", ()) if name in _RESHAPING else ()
        if len(shape) > 2 and shape[0] == samples and shape.count(samples) == 1:
            return True
        if name == "Addmm":  # bias, inputs, weight
            node = below[1][0]
        elif name in _MOVING or name in _RESHAPING or name in _KEEPING:
            node = below[0][0] if below else None
        else:
            return True
    return True


def _moves_first(node: Any) -> bool:
    """Whether the first axis of what a node was given is not the first of its output."""
    name = _name(node)
    if name == "Permute":
        return bool(node._saved_dims and node._saved_dims[0] != 0)
    if name == "Transpose":
        axes = (_signed(node._saved_dim0), _signed(node._saved_dim1))
        return any(axis == 0 or axis < -2 for axis in axes)
    return name == "T" or node._saved_dim == 0  # Slice, Select


def _signed(number: int) -> int:
    """A negative number that torch stores as an unsigned one."""
    return number - 2**64 if number >= 2**63 else number


def _checked(weights: Tensor) -> Tensor:
    if weights.numel() and float(weights.amin()) < 0:
        raise UnsupportedLossError(
            "Some terms of the loss have a negative weight, so it is not a negative "
            "log-likelihood: name the distribution of the labels with loss=, or use "
            "fisher='empirical'."
        )
    return weights


def _name(node: Any) -> str:
    """``"NllLoss"`` for ``NllLossBackward0``."""
    return re.sub(r"Backward\d*$", "", node.name())
