"""AdaHessian: Adam with Hutchinson's diagonal of the Hessian in place of the gradient's squares."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, OptionError, check_count, check_option, check_seed
from ..operators import DiagonalOperator, Operator
from ..problem.blocks import layer_of
from .checks import finite, non_negative
from .diagnosing import angle, first_bad_layer, spread
from .double_backward import (
    check_differentiable,
    fitting,
    gradient_and_products,
    rademacher,
    twice_differentiable,
)
from .every_parameter import EveryParameter
from .loss_scale import LossScale, take_scale
from .rows import Rows

AVERAGING = ("paper", "release", "none")
Probes = Callable[[list[Tensor]], Sequence[Tensor]]


def diagonal_estimate(z: Tensor, product: Tensor, averaging: str, kernel_axes: int) -> Tensor:
    """``z * (H z)``, for ``"release"`` ``|H z|``, averaged over the last ``kernel_axes`` axes."""
    D = product.abs() if averaging == "release" else z * product
    if kernel_axes:
        D = D.mean(tuple(range(-kernel_axes, 0)), keepdim=True).expand_as(D)
    return D


def adahessian_update(
    theta: Tensor,
    gradient: Tensor,
    m: Tensor,
    denominator: Tensor,
    step: int,
    *,
    lr: float,
    beta1: float,
    weight_decay: float,
) -> None:
    """One step for one parameter, in place; ``step`` counts from 1.

    ``m <- beta1 m + (1 - beta1) g``,
    ``theta <- theta - lr ((m / (1 - beta1^step)) / denominator + weight_decay theta)``.
    """
    m.lerp_(gradient.to(m.dtype), 1 - beta1)
    target = theta if theta.dtype == m.dtype else theta.to(m.dtype)
    if weight_decay:
        target.mul_(1 - lr * weight_decay)
    target.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
    if target is not theta:
        theta.copy_(target)


class AdaHessian(EveryParameter):
    r"""AdaHessian (Yao, Gholami, Shen, Mustafa, Keutzer, Mahoney, AAAI 2021, arXiv 2006.00719).

    With ``z`` of independent +1 and -1 (section 3 of the paper: Hutchinson's diagonal, spatial
    averaging, Hessian momentum):

    (1) ``D = z * (H z)``, an unbiased estimate of the Hessian's diagonal, the mean over
        ``n_probes`` of them; convolution weights are averaged over the kernel;
    (2) ``m <- beta1 m + (1 - beta1) g``, ``v <- beta2 v + (1 - beta2) D^2``;
    (3) ``m^ = m / (1 - beta1^t)``, ``v^ = v / (1 - beta2^u)`` with ``u`` updates of ``v`` so far;
    (4) ``theta <- theta - lr (m^ / (v^^(k/2) + eps) + weight_decay theta)``, ``k`` being the
        ``hessian_power``.

    ``curvature()`` is the diagonal ``v^^(k/2) + eps``, ``damped=False`` leaves ``eps`` out.

    ``averaging="release"`` takes ``|H z|`` for ``z * (H z)`` before averaging over the kernel, as
    the authors' code for image classification does, and averages parameters with four axes only;
    the paper's average keeps the signs, so that errors of both signs cancel. With
    ``averaging="paper"`` the weights of convolutions of any dimension are averaged; if only
    parameters are given, all with three axes and more are taken for such. ``averaging="none"`` is
    the paper's method without its spatial averaging.

    ``step(closure)``: the closure returns the loss and does *not* call ``backward()``. While it
    runs, attention takes the kernel that has a second derivative, and convolutions and BatchNorm
    get faster ones than torch's. Or, for gradient accumulation, clipping and ``GradScaler``, call
    ``optimizer.backward(loss)`` in place of ``loss.backward()``, any number of times, and then
    ``step()`` (with ``DistributedDataParallel`` run the model under ``no_sync()`` for this). Both
    leave the gradient in ``.grad``. With ``update_every=n`` the product is taken in every n-th step
    only; in the steps between, ``loss.backward()`` and ``step()`` do.

    Gradient and product come from ``torch.autograd.grad``; the released code's
    ``loss.backward(create_graph=True)`` keeps a reference cycle alive, and is never used.

    ``target`` is a model, (name, parameter) pairs, parameters or group dictionaries. ``probes``
    maps the list of parameters to a list of vectors of their shapes, with mean 0 and covariance I;
    by default they are drawn from a generator that starts at ``seed`` and is saved with the state.

    Cost: a step is one gradient and, per probe, one product of about two more. State: ``m``, ``v``.

    >>> import torch
    >>> import curvscope as cs
    >>> optimizer = cs.optim.AdaHessian(torch.nn.Linear(3, 2), lr=0.15)
    """

    method: ClassVar[str] = "AdaHessian"
    _step_supports_amp_scaling = True

    def __init__(
        self,
        target: Any,
        lr: float = 0.15,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-4,
        weight_decay: float = 0.0,
        hessian_power: float = 1.0,
        averaging: str = "paper",
        probes: Probes | None = None,
        *,
        n_probes: int = 1,
        update_every: int = 1,
        seed: int = 0,
        params: Any = None,
        maximize: bool = False,
        process_group: Any = None,
    ) -> None:
        check_option("averaging", averaging, AVERAGING)
        if probes is not None and not callable(probes):
            raise OptionError(f"probes={probes!r} must be a function of the list of parameters.")
        self.averaging, self.probes = averaging, probes
        self.n_probes = check_count("n_probes", n_probes)
        self.update_every = check_count("update_every", update_every)
        self.loss_scale: LossScale = None
        self._drawn: list[list[Tensor]] = []  # probes of the step under way, and products with them
        self._products: list[list[Tensor]] = []
        self._before: Tensor | None = None  # the generator's state before they were drawn
        self._own_gradients = False
        self._fresh = False  # whether parameters came that have no curvature yet
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "hessian_power": hessian_power,
            "maximize": maximize,
        }
        super().__init__(target, params, defaults, process_group=process_group)
        self._generator = torch.Generator(self.device).manual_seed(check_seed(seed))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with options of their own."""
        super().add_param_group(param_group)
        self._fresh = self._fresh or self._bound

    def _check_group(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise OptionError(f"betas={betas!r} must be two numbers, such as (0.9, 0.999).")
        for k in (0, 1):
            non_negative(f"betas[{k}]", betas[k], below=1.0)
        non_negative("eps", group["eps"], positive=True)
        non_negative("hessian_power", group["hessian_power"])

    def _bind(self) -> None:
        super()._bind()
        modules = dict(self.model.named_modules())
        self._kernel_axes = {
            name: self._count_kernel_axes(p, modules.get(layer_of(name)))
            for name, p in self.params.items()
        }

    def _count_kernel_axes(self, p: Tensor, layer: nn.Module | None) -> int:
        if self.averaging == "none":
            return 0
        if self.averaging == "release":
            return 2 if p.ndim == 4 else 0
        if layer is None and not any(True for _ in self.model.children()):  # parameters, no model
            return max(p.ndim - 2, 0)
        kernel = getattr(layer, "kernel_size", ())
        convolution = isinstance(layer, nn.modules.conv._ConvNd)
        return len(kernel) if convolution and p.ndim == len(kernel) + 2 else 0

    # -- gradients and products ------------------------------------------------------------------

    def _due(self) -> bool:
        """Whether the next step needs ``H z``: by the clock, or since a parameter has none yet."""
        return self.steps % self.update_every == 0 or self._fresh

    def backward(self, loss: Tensor) -> None:
        """In place of ``loss.backward()``: add to ``.grad``, and to what the step needs of ``H z``.

        The forward pass must have kept its graph; attention must have run under
        ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``, since the other kernels have no second
        derivative. The graph is freed.
        """
        check_differentiable(loss, self.method)
        parameters = list(self.params.values())
        with torch.enable_grad():
            probes = self._draw(parameters) if self._due() else []
            gradients, products = gradient_and_products(loss, parameters, probes, self.method)
        for p, g in zip(parameters, gradients):
            if g is not None:
                p.grad = g.detach() if p.grad is None else p.grad + g.detach()
        self._own_gradients = True
        if products:
            known = self._products or [[torch.zeros_like(p) for p in parameters]] * len(products)
            self._products = [[a + b for a, b in zip(x, y)] for x, y in zip(known, products)]

    def _draw(self, parameters: list[nn.Parameter]) -> list[list[Tensor]]:
        """This step's probes: the same ones for all losses of a step."""
        if not self._drawn:
            self._before = self._generator.get_state()
            draw = self.probes or (lambda parameters: rademacher(parameters, self._generator))
            self._drawn = [
                fitting(draw(list(parameters)), parameters) for _ in range(self.n_probes)
            ]
        return self._drawn

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; the products since the last step go too."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self, *, undraw: bool = False) -> None:
        """Drop this step's products; with ``undraw`` its probes will be drawn again."""
        if undraw and self._before is not None:
            self._generator.set_state(self._before)
        self._before = None
        self._drawn, self._products, self._own_gradients = [], [], False

    # -- the step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Take a step with the closure's loss, or after :meth:`backward`; returns the loss.

        Raises ``NonFiniteError``, with parameters and state unchanged, if the loss, its gradient
        or the product with the Hessian is NaN or infinite.
        """
        self._check_ready()
        try:
            with self._or_back(closure):
                loss = None if closure is None else self._evaluate(closure)
                scale, skip = take_scale(self, self.loss_scale)
                if skip:
                    self._forget()
                    return loss
                self._check_gradients()
                self._check_loss(loss)
                products = self._joint(scale)
        except NonFiniteError:
            self._forget(undraw=True)
            raise
        if self._due() and not products:
            raise OptionError(
                f"{self.method} has no curvature for this step: pass a closure that returns the "
                "loss, or call optimizer.backward(loss) in place of loss.backward() "
                "(with or without create_graph=True)."
            )
        groups = {id(p): group for group in self.param_groups for p in group["params"]}
        for k, (name, p) in enumerate(self.params.items()):
            if p.grad is None:
                continue
            estimates = [
                diagonal_estimate(z[k], hz[k], self.averaging, self._kernel_axes[name])
                for z, hz in zip(self._drawn, products)
            ]
            if estimates or self.state[p].get("updates"):  # else it waits for its curvature
                self._update(p, groups[id(p)], estimates)
        self.steps += 1
        self._fresh = False
        self._forget()
        return loss

    def _evaluate(self, closure: Callable[[], Tensor]) -> Tensor:
        if not callable(closure):
            raise OptionError(
                f"{self.method}.step takes a function that returns the loss, not "
                f"{type(closure).__name__}."
            )
        with twice_differentiable(self.model, self._wrapper), torch.enable_grad():
            loss = closure()
            self._forget()
            for p in self.params.values():
                p.grad = None
            if isinstance(loss, Tensor) and loss.numel() == 1 and not finite(loss):
                alone = self._process_group is None
                where = first_bad_layer(self.model, closure, self.device) if alone else None
                self._check_loss(loss, where)
            self.backward(loss)
        return loss.detach()

    def _joint(self, scale: float) -> list[list[Tensor]]:
        """Products of the unscaled loss of all ranks; refused if they are not finite."""
        products = [[h / scale for h in hz] if scale != 1 else hz for hz in self._products]
        if self._own_gradients and self._process_group is not None:
            gradients = [p.grad for p in self.params.values() if p.grad is not None]
            means = self.average([*gradients, *(h for hz in products for h in hz)])
            for g, mean in zip(gradients, means):
                g.copy_(mean)
            rest, size = means[len(gradients) :], len(self.params)
            products = [rest[k * size : (k + 1) * size] for k in range(len(products))]
        for hz in products:
            norms = torch.stack([n.double() for n in torch._foreach_norm(hz, math.inf)]).tolist()
            # beyond it the squares would be infinite, and stay so in v
            limit = torch.finfo(self.factor_dtype).max ** 0.5
            if not all(norm < limit for norm in norms):
                name = next(n for n, norm in zip(self.params, norms) if not norm < limit)
                raise NonFiniteError(
                    f"{self.method} did not take step {self.steps + 1}: the product with the "
                    f"Hessian is NaN or infinite in layer {layer_of(name)!r} ({name}), although "
                    "loss and gradient are finite. Parameters and state are unchanged. A square "
                    "root or norm at zero has no second derivative: add a small number inside it."
                )
        return products

    def _update(
        self, p: nn.Parameter, group: Mapping[str, Any], estimates: Sequence[Tensor]
    ) -> None:
        state = self.state[p]
        dtype = torch.promote_types(p.dtype, torch.float32)
        if "m" not in state:
            state["step"] = state["updates"] = 0
            state["m"] = torch.zeros_like(p, dtype=dtype)
            state["v"] = torch.zeros_like(p, dtype=dtype)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        if estimates:
            D = sum(estimates[1:], estimates[0]).to(dtype) / len(estimates)
            state["v"].mul_(beta2).addcmul_(D, D, value=1 - beta2)
            state["updates"] += 1
            state["refreshed"] = self.steps
        assert p.grad is not None
        adahessian_update(
            p,
            -p.grad if group["maximize"] else p.grad,
            state["m"],
            self._power(p, group).add_(group["eps"]),
            state["step"],
            lr=float(group["lr"]),
            beta1=beta1,
            weight_decay=group["weight_decay"],
        )

    def _power(self, p: Tensor, group: Mapping[str, Any]) -> Tensor:
        """``v^^(k/2)``."""
        state = self.state[p]
        v = state["v"] / (1 - group["betas"][1] ** state["updates"])
        return v.sqrt_() if group["hessian_power"] == 1 else v.pow_(group["hessian_power"] / 2)

    # -- saving and inspection -------------------------------------------------------------------

    def _extra_state(self) -> dict[str, Any]:
        return {"generator": self._generator.get_state(), "fresh": self._fresh}

    def _load_extra_state(self, extra: Mapping[str, Any]) -> None:
        self._generator.set_state(extra["generator"].cpu())
        self._fresh = extra["fresh"]

    def _operator(self, block: str, kind: str) -> Operator | None:
        parameters = [self.params[name] for name in self.blocks[block]]
        if any("v" not in self.state.get(p, {}) for p in parameters):
            return None
        raw = [self._power(p, self.group_of(p)) for p in parameters]
        if kind != "raw":
            raw = [r.add_(self.group_of(p)["eps"]) for r, p in zip(raw, parameters)]
        F = torch.cat([r.reshape(-1) for r in raw])
        return DiagonalOperator(1 / F if kind == "preconditioner" else F)

    def _damping(self, block: str) -> float | None:
        return self._common(block, "eps")

    def _factors(self, block: str) -> dict[str, Tensor]:
        """``D``: the root mean square of the estimates ``[d]``, in parameter order."""
        parts = []
        for name in self.blocks[block]:
            p = self.params[name]
            state, beta2 = self.state[p], self.group_of(p)["betas"][1]
            parts.append((state["v"] / (1 - beta2 ** state["updates"])).sqrt().reshape(-1))
        return {"D": torch.cat(parts)}

    def _reason(self, name: str) -> str:
        axes = self._kernel_axes[name]
        return f"averaged over {axes} kernel axes" if axes else "every parameter"

    def _diagnose(self, block: str) -> dict[str, Any]:
        op = self._operator(block, "damped")
        if op is None:
            return {}
        parameters = [self.params[name] for name in self.blocks[block]]
        state, F = self.state[parameters[0]], op.diagonal()
        m = torch.cat([self.state[p]["m"].reshape(-1) for p in parameters])
        eps = self.group_of(parameters[0])["eps"]
        age = self.steps - 1 - state["refreshed"]
        return {
            "age": age,
            "refreshes": state["updates"],
            **spread(F, eps),
            "angle": angle(m / F, m),
        }

    def diagnostics(self) -> Rows:
        """One row per block: ``age`` of the curvature in steps and how many ``refreshes`` there
        were, the extremes ``F_min`` and ``F_max`` of ``F = v^^(k/2) + eps`` and their quotient
        ``condition``, ``eps`` over the median of ``F`` (``damping_share``), and the ``angle``
        between ``m / F`` and the averaged gradient ``m`` in degrees.
        """
        return super().diagnostics()
