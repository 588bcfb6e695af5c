"""M-FAC: the exact inverse of the damped empirical Fisher of the last gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import OptionError, UnknownBlockError, check_count, nearest
from ..operators import Damped, LowRankOperator, Operator, Provenance
from ..operators.blocks import MappedBlocks
from .checks import finite, non_negative
from .diagnosing import angle, first_bad_layer
from .every_parameter import EveryParameter
from .passes import call_closure
from .rows import Rows


def replace_row(V: Tensor, gram: Tensor, row: int, gradient: Tensor) -> None:
    """Put a gradient into row ``row`` of the window ``V`` ``[m, P]`` and of ``gram = V V^T``."""
    V[row] = gradient
    products = (V @ V[row]).to(gram.dtype)
    gram[row], gram[:, row] = products, products


def inverse_times(
    V: Tensor, gram: Tensor, damping: float, coefficients: Tensor, rest: Tensor | None
) -> Tensor:
    """``(damping I + V^T V / m)^-1 x`` for ``x = V^T coefficients + rest``.

    With ``K = damping I + gram / m``, of size ``m``: ``V^T K^-1 coefficients`` for the part in the
    window's span, where no digits cancel, and Woodbury's
    ``(rest - V^T K^-1 V rest / m) / damping`` for what lies outside.
    """
    m = V.shape[0]
    K = gram / m
    K.diagonal().add_(damping)
    right = coefficients.to(K.dtype)
    if rest is not None:
        right = right - (V @ rest).to(K.dtype) / (m * damping)
    result = solve_positive(K, right, damping).to(V.dtype) @ V
    return result if rest is None else result.add_(rest, alpha=1 / damping)


def solve_positive(K: Tensor, right: Tensor, least: float) -> Tensor:
    """``K^-1 right`` for a ``K`` whose eigenvalues are ``least`` or more up to rounding."""
    factor, failed = torch.linalg.cholesky_ex(K)
    if not bool(failed):
        return torch.cholesky_solve(right.unsqueeze(1), factor).squeeze(1)
    values, vectors = torch.linalg.eigh(K)
    return vectors @ ((vectors.mT @ right) / values.clamp_min(least))


class Window(LowRankOperator):
    """A matrix of low rank over all parameters that gives its diagonal blocks on demand."""

    members: dict[str, tuple[str, ...]]

    @property
    def blocks(self) -> Mapping[str, Operator]:
        return MappedBlocks(list(self.members), self._block)

    def _block(self, name: str) -> Operator:
        if name not in self.members:
            raise UnknownBlockError(
                f"There is no block {name!r}.{nearest(str(name), self.members)} "
                f"Blocks are {', '.join(map(repr, self.members))}."
            )
        return self.restrict(self.members[name])

    def inverted(self, damping: float) -> Operator:
        """``(self + damping I)^-1``, whose blocks are those of the inverse."""
        found, shift = self.inverse(damping), 0.0
        if isinstance(found, Damped) and isinstance(found.base, LowRankOperator):
            V, weights, shift = *found.base.factors.values(), found.damping
        else:  # as many gradients as parameters
            values, V = self.eigh()
            weights = 1 / (values.clamp_min(0) + damping)
        inverse = Window(V, weights, layout=self.layout, info=self.info)
        inverse.members, inverse.positive_semidefinite = self.members, None
        return inverse.damped(shift).with_info(what=self.info.what) if shift else inverse


class MFAC(EveryParameter):
    r"""M-FAC (Frantar, Kurtic, Alistarh, NeurIPS 2021, arXiv 2107.03356), the dynamic algorithm.

    With the gradients ``g_1 ... g_m`` of the last ``m <= memory`` steps (``memory`` from the
    ``memory``-th step on), a step is

    (1) ``F = damping I + (1/m) sum_i g_i g_i^T``, the present gradient among them;
    (2) ``M <- momentum M + (1 - momentum) g``, ``M^ = M / (1 - momentum^t)``;
    (3) ``theta <- theta - lr (F^-1 M^ + weight_decay theta)``.

    ``F^-1`` is exact: the paper's recursion and its ``O(m)`` update of coefficients are replaced by
    the ``m x m`` Gram matrix of the window, of which one row changes per step, and its Cholesky
    factor in float64. ``M`` is kept as a combination of the window's gradients and a rest, which
    is zero until gradients drop out of the window, so that no digits cancel for small ``damping``.

    The gradients are of minibatches: ``F`` is not the empirical Fisher of samples. All parameters
    share one ``F``, also across layers; ``lr`` and ``weight_decay`` may differ between groups.

    ``target`` is a model, (name, parameter) pairs, parameters or group dictionaries. Use
    ``step()`` after ``backward()``, or ``step(closure)`` with a closure that calls it.

    Cost: a step reads the window twice (``2 m P`` multiplications) and solves ``m`` equations.
    State: ``(memory + 1) P`` numbers.

    >>> import torch
    >>> import curvscope as cs
    >>> optimizer = cs.optim.MFAC(torch.nn.Linear(3, 2), lr=1e-3, damping=1e-3, memory=10)
    """

    method: ClassVar[str] = "M-FAC"

    def __init__(
        self,
        target: Any,
        lr: float = 1e-3,
        damping: float = 1e-3,
        memory: int = 100,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        params: Any = None,
        maximize: bool = False,
        process_group: Any = None,
    ) -> None:
        self.damping = non_negative("damping", damping, positive=True)
        self.momentum = non_negative("momentum", momentum, below=1.0)
        self.memory = check_count("memory", memory)
        self._window: dict[str, Tensor] = {}
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(target, params, defaults, process_group=process_group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, in whose directions the gradients of the past are zero."""
        if self._bound and self._window:
            raise OptionError(
                f"{self.method} holds gradients of the parameters it was built with; build a new "
                "optimizer for others."
            )
        super().add_param_group(param_group)

    # -- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step with the gradients in ``.grad``, or those that ``closure`` computes.

        Returns the closure's loss. Raises ``NonFiniteError``, with parameters and state unchanged,
        if the loss or a gradient is NaN or infinite.
        """
        self._check_ready()
        loss = where = None
        with self._or_back(closure):
            if closure is not None:
                loss = call_closure(closure, self.method)
                if not finite(loss) and self._process_group is None:
                    where = first_bad_layer(self.model, closure, self.device)
            self._check_gradients()
            self._check_loss(loss, where)
        self._take(self._flat_gradient(), self.steps)
        step = self._direction(self.steps + 1)
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for name, direction in self.layout.split(step).items():
            p = self.params[name]
            if p.grad is not None:
                lr, weight_decay = float(groups[id(p)]["lr"]), groups[id(p)]["weight_decay"]
                if weight_decay:
                    p.mul_(1 - lr * weight_decay)
                p.sub_((lr * direction).to(p.dtype))
        self.steps += 1
        return loss

    def _flat_gradient(self) -> Tensor:
        """The gradient ``[P]``, with its sign turned where a group maximizes."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        turned = {id(p) for g in self.param_groups if g["maximize"] for p in g["params"]}
        parts = []
        for p in self.params.values():
            g = torch.zeros_like(p) if p.grad is None else p.grad
            g = (g.to_dense() if g.is_sparse else g).reshape(-1).to(dtype)
            parts.append(-g if id(p) in turned else g)
        return torch.cat(parts)

    def _take(self, gradient: Tensor, before: int) -> None:
        """Let the gradient replace the oldest one and join the average, after ``before`` steps."""
        if not self._window:
            V = gradient.new_zeros(self.memory, gradient.numel())
            gram = gradient.new_zeros(self.memory, self.memory, dtype=torch.float64)
            self._window = {"V": V, "gram": gram, "coefficients": gram.new_zeros(self.memory)}
        row, known = before % self.memory, min(before + 1, self.memory)
        V, gram, coefficients = self._views(known)
        coefficients.mul_(self.momentum)
        if before >= self.memory and self.momentum:  # the oldest gradient leaves the window
            rest = self._window.setdefault("rest", torch.zeros_like(gradient))
            rest.mul_(self.momentum).add_(V[row], alpha=float(coefficients[row]))
        replace_row(V, gram, row, gradient)
        coefficients[row] = 1 - self.momentum

    def _views(self, known: int) -> tuple[Tensor, Tensor, Tensor]:
        """The filled part of the window, its Gram matrix and the coefficients of ``M``."""
        w = self._window
        return w["V"][:known], w["gram"][:known, :known], w["coefficients"][:known]

    def _direction(self, steps: int) -> Tensor:
        """``F^-1 M^`` ``[P]`` after ``steps`` gradients."""
        V, gram, coefficients = self._views(min(steps, self.memory))
        direction = inverse_times(V, gram, self.damping, coefficients, self._window.get("rest"))
        return direction.div_(1 - self.momentum**steps)

    # -- saving and inspection -------------------------------------------------------------------

    def averaged_gradient(self) -> Tensor:
        """``M^`` ``[P]`` of the last step: what the preconditioner was applied to."""
        if not self._window:
            return torch.zeros(self.layout.numel, dtype=self.dtype, device=self.device)
        V, _, coefficients = self._views(min(self.steps, self.memory))
        average = coefficients.to(V.dtype) @ V
        if "rest" in self._window:
            average += self._window["rest"]
        return average / (1 - self.momentum**self.steps)

    def _extra_state(self) -> dict[str, Any]:
        return {"window": self._window}

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        window = extra["window"]
        if window and window["V"].shape[0] != self.memory:
            raise OptionError(
                f"The saved state holds up to {window['V'].shape[0]} gradients, this {self.method} "
                f"memory={self.memory}: build it with the memory that it was saved with."
            )
        kinds = dict.fromkeys(("V", "rest"), self.factor_dtype)
        self._window = {
            k: v.detach().to(self.device, kinds.get(k, v.dtype), copy=True)
            for k, v in window.items()
        }

    def curvature(  # type: ignore[override]
        self, *, damped: bool = True, blocks: Sequence[str] | None = None
    ) -> Operator:
        """``F`` over all parameters; ``damped=False``: ``(1/m) sum_i g_i g_i^T``, of low rank.

        With ``blocks`` the diagonal blocks of these names alone.
        """
        if not self._window or blocks is not None:
            return super().curvature(damped=damped, blocks=blocks)
        return self._whole("damped" if damped else "raw")

    def preconditioner(self) -> Operator:  # type: ignore[override]
        """``F^-1``, as applied to the averaged gradient."""
        if not self._window:
            return super().preconditioner()
        return self._whole("preconditioner")

    def _whole(self, kind: str) -> Operator:
        """Raw and damped curvature and its inverse: low rank, and a multiple of the identity."""
        V = self._views(min(self.steps, self.memory))[0].clone()
        settings = {"uncovered": {}, "gradients": len(V), **self._settings(kind, list(self.blocks))}
        what = f"{self.method} {'preconditioner' if kind == 'preconditioner' else 'curvature'}"
        info = Provenance(what=what, route="optimizer", exact=False, settings=settings)
        raw = Window(V.mT, V.new_full((len(V),), 1 / len(V)), layout=self.layout, info=info)
        raw.members = dict(self.blocks)
        if kind == "raw":
            return raw
        return raw.damped(self.damping) if kind == "damped" else raw.inverted(self.damping)

    def _damping(self, block: str) -> float:
        return self.damping

    def _operator(self, block: str, kind: str) -> Operator | None:
        if not self._window:
            return None
        return self._whole(kind).restrict(self.blocks[block])

    def _factors(self, block: str) -> dict[str, Tensor]:
        """``V``: the window's gradients in the block's parameters ``[m, d]``, in no order."""
        index = self.layout.index(self.blocks[block]).to(self.device)
        return {"V": self._views(min(self.steps, self.memory))[0][:, index]}

    def diagnostics(self) -> Rows:
        """One row per block; ``eigenvalue_max`` and ``condition`` are those of the whole ``F``.

        ``angle``: between the step and the averaged gradient, in degrees.
        """
        rows = super().diagnostics()
        if not self._window:
            return rows
        V, gram, _ = self._views(min(self.steps, self.memory))
        largest = float(torch.linalg.eigvalsh(gram / len(V))[-1])
        direction = self.layout.split(self._direction(self.steps))
        average = self.layout.split(self.averaged_gradient())
        for row in rows:
            pair = [
                torch.cat([part[name].reshape(-1) for name in self.blocks[row["block"]]])
                for part in (direction, average)
            ]
            row |= {
                "age": 0,
                "gradients": len(V),
                "eigenvalue_max": largest,
                "condition": (largest + self.damping) / self.damping,
                "angle": angle(*pair),
            }
        return rows
