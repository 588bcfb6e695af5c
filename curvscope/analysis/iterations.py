"""Iterations for symmetric linear systems of several right-hand sides, step by step.

The vectors of all systems are columns, multiplied together; each system has its own step sizes, in
float64. A system that is done is left out of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import NotDefinedError

Multiply = Callable[[Tensor], Tensor]
_NOISE = 20.0  # times eps and the largest entry of the tridiagonal matrix: no more than rounding
_LOST = {torch.float64: 1e-8, torch.float32: 2e-5}  # |A r| / (|A| |r|) of what A does not reach
_WATCHED = 10  # steps
_UNSAFE = 50.0  # times the noise
_FLOOR = 0.1  # of a residual


def dots(u: Tensor, v: Tensor) -> Tensor:
    """Inner products of the columns of two ``[P, k]``, summed in float64: ``[k]``."""
    if not u.shape[1]:
        return torch.zeros(0, dtype=torch.float64, device=u.device)
    return torch.stack(
        [(a.double() * b.double()).sum() for a, b in zip(u.unbind(1), v.unbind(1), strict=True)]
    )


class Iteration:
    """What both methods share; ``state`` is complete between two steps.

    ``x`` ``[P, k]`` solves the systems with right-hand side ``b`` more and more, from zero;
    ``norms`` ``[k]`` are the lengths of the residuals as the iteration knows them. ``ended``
    ``[k]`` says where it cannot go on: conjugate gradients, as the matrix is not positive
    definite; minimal residuals, as the Krylov space is exhausted or what is left of ``b`` is out
    of the matrix's reach.
    """

    kept: tuple[str, ...] = ()  # names of the tensors that make up the state

    def __init__(self, multiply: Multiply, precondition: Multiply | None) -> None:
        self.multiply = multiply
        self.precondition = precondition
        self.x: Tensor
        self.norms: Tensor
        self.ended: Tensor

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors from which :meth:`resume` goes on."""
        return {name: getattr(self, name).clone() for name in self.kept}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from the state of an earlier iteration with the same systems."""
        for name in self.kept:
            mine = getattr(self, name)
            setattr(self, name, state[name].to(device=mine.device, dtype=mine.dtype))

    def step(self, active: Tensor) -> None:
        """One product with every column that ``active`` ``[k]`` names (indices)."""
        raise NotImplementedError

    def _preconditioned(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """``z = M r`` and ``r . z``, refused where ``M`` is not positive definite."""
        if self.precondition is None:
            return r, dots(r, r)
        z = self.precondition(r)
        product = dots(r, z)
        if bool(((product <= 0) & r.any(0).to(product.device)).any()):
            raise NotDefinedError(
                "The preconditioner is not positive definite: r.(M r) is not positive for a "
                "residual r. Pass an approximate inverse such as "
                "cs.kfac(problem).inverse(damping)."
            )
        return z, product


class ConjugateGradients(Iteration):
    """For positive definite matrices (Hestenes and Stiefel 1952).

    ``x`` minimises the model ``x.A x / 2 - b.x`` over the Krylov space; where ``p.A p <= 0`` the
    column has ``ended``.
    """

    kept = ("x", "r", "p", "rz", "norms", "ended")

    def __init__(self, multiply: Multiply, b: Tensor, precondition: Multiply | None = None) -> None:
        super().__init__(multiply, precondition)
        self.x, self.r = torch.zeros_like(b), b.clone()
        self.p, self.rz = self._preconditioned(self.r)
        self.p = self.p.clone()
        self.norms = dots(b, b).sqrt()
        self.ended = torch.zeros_like(self.norms, dtype=torch.bool)

    def step(self, active: Tensor) -> None:
        p = self.p[:, active]
        image = self.multiply(p)
        curvature = dots(p, image)
        noise = torch.finfo(p.dtype).eps * dots(p, p).sqrt() * dots(image, image).sqrt()
        going = curvature > noise
        self.ended[active] |= ~going
        active, p, image, curvature = active[going], p[:, going], image[:, going], curvature[going]
        if not len(active):
            return
        size = (self.rz[active] / curvature).to(p.dtype)
        self.x[:, active] += size * p
        r = self.r[:, active] - size * image
        z, rz = self._preconditioned(r)
        self.p[:, active] = z + (rz / self.rz[active]).to(p.dtype) * p
        self.r[:, active], self.rz[active] = r, rz
        self.norms[active] = dots(r, r).sqrt()


class MinimalResiduals(Iteration):
    """MINRES, for symmetric matrices of any sign (Paige and Saunders 1975).

    ``x`` minimises the residual over the Krylov space, in the norm of the preconditioner if there
    is one (Elman, Silvester and Wathen 2014, algorithm 4.1): ``norms`` are then its lengths times
    those of the first residual over their own.
    """

    kept = (
        *("x", "v", "v_old", "z", "w", "w_old", "gamma", "gamma_old", "eta"),
        *("c", "c_old", "s", "s_old", "norms", "ratio", "scale", "ended"),
        *("steps", "norms_before", "lengths_before"),
    )

    def __init__(self, multiply: Multiply, b: Tensor, precondition: Multiply | None = None) -> None:
        super().__init__(multiply, precondition)
        self.x = torch.zeros_like(b)
        self.v, self.v_old = b.clone(), torch.zeros_like(b)
        self.w, self.w_old = torch.zeros_like(b), torch.zeros_like(b)
        z, square = self._preconditioned(self.v)
        self.z = z.clone()
        self.gamma = square.sqrt()
        self.eta, self.gamma_old = self.gamma.clone(), torch.ones_like(self.gamma)
        self.c, self.c_old = torch.ones_like(self.eta), torch.ones_like(self.eta)
        self.s, self.s_old = torch.zeros_like(self.eta), torch.zeros_like(self.eta)
        self.norms = dots(b, b).sqrt()
        self.ended = torch.zeros_like(self.norms, dtype=torch.bool)
        self.scale = torch.zeros_like(self.norms)
        self.steps = torch.zeros_like(self.norms, dtype=torch.long)
        self.norms_before = torch.full_like(self.norms, torch.inf)
        self.lengths_before = torch.zeros_like(self.norms)
        self.ratio = self.norms / self.gamma.clamp_min(torch.finfo(torch.float64).tiny)

    def step(self, active: Tensor) -> None:
        names = ("gamma", "gamma_old", "eta", "c", "c_old", "s", "s_old")
        gamma, gamma_old, eta, c, c_old, s, s_old = (getattr(self, n)[active] for n in names)
        kind = self.x.dtype
        z = self.z[:, active] / gamma.to(kind)
        image = self.multiply(z)
        delta = dots(image, z)
        v = image - (delta / gamma).to(kind) * self.v[:, active]
        v -= (gamma / gamma_old).to(kind) * self.v_old[:, active]
        z_new, square = self._preconditioned(v)
        gamma_new = square.sqrt()
        # the last column of the tridiagonal matrix, turned by the last two and one new rotation
        bare = c * delta - c_old * s * gamma
        length = torch.hypot(bare, gamma_new)
        above, further = s * delta + c_old * c * gamma, s_old * gamma
        self.scale[active] = self.scale[active].maximum(delta.abs()).maximum(gamma_new)
        noise = _NOISE * torch.finfo(kind).eps * self.scale[active]
        image_of_residual = torch.hypot(bare, c * gamma_new)  # |A r| / |r|
        lost = image_of_residual <= _LOST[kind] * self.scale[active]
        self.ended[active] |= (gamma_new <= noise) | lost
        # along what is lost a step is rounding over rounding: long, and of no use
        singular = (length <= noise) | (lost & (length <= _UNSAFE * noise))
        length = torch.where(singular, 1.0, length)
        c_new, s_new = bare / length, gamma_new / length
        w = z - further.to(kind) * self.w_old[:, active] - above.to(kind) * self.w[:, active]
        w /= length.to(kind)
        x = self.x[:, active] + torch.where(singular, 0.0, c_new * eta).to(kind) * w
        norms = (s_new * eta * self.ratio[active]).abs()
        if self.precondition is None:  # rounding of A x alone is as large as what is left
            floor = torch.finfo(kind).eps * self.scale[active] * dots(x, x).sqrt()
            spoilt = floor > _FLOOR * norms
            self.ended[active] |= spoilt
            long = spoilt & (norms > _FLOOR * (eta * self.ratio[active]).abs())
            x = torch.where(long, self.x[:, active], x)
        self.x[:, active] = x
        self.v_old[:, active], self.v[:, active] = self.v[:, active], v
        self.w_old[:, active], self.w[:, active] = self.w[:, active], w
        self.z[:, active] = z_new
        self.gamma_old[active], self.gamma[active] = gamma, gamma_new
        self.c_old[active], self.c[active] = c, c_new
        self.s_old[active], self.s[active] = s, s_new
        self.eta[active] = -s_new * eta
        self.norms[active] = norms
        self.steps[active] += 1
        self._watch(active[self.steps[active] % _WATCHED == 0])

    def _watch(self, columns: Tensor) -> None:
        """End where ``x`` grows and nothing is gained: it does on singular matrices."""
        lengths = dots(self.x[:, columns], self.x[:, columns]).sqrt()
        idle = self.norms[columns] > 0.999 * self.norms_before[columns]
        self.ended[columns] |= idle & (lengths > 3 * self.lengths_before[columns])
        self.norms_before[columns], self.lengths_before[columns] = self.norms[columns], lengths
