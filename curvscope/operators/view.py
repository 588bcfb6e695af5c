"""The matrix view: how the parameters of a layer form the matrix on which factors act."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError, ShapeError


@dataclass(frozen=True, eq=False)
class MatrixView:
    """A block's vector ``[d]`` seen as ``groups`` matrices ``[out, inp]``.

    ``M.flatten() == v[perm]`` for a vector ``v`` in parameter order and its view ``M`` of shape
    ``[groups, out, inp]``; ``perm=None`` is the identity. ``out`` counts the rows of one group,
    and ``inp`` includes the column of a bias.
    """

    groups: int
    out: int
    inp: int
    perm: Tensor | None = None

    def __post_init__(self) -> None:
        if min(self.groups, self.out, self.inp) < 1:
            raise OptionError(f"A matrix view needs positive sizes, not {self.shape}.")
        if self.perm is None:
            return
        perm = self.perm.detach()
        if perm.shape != (self.numel,) or perm.is_floating_point():
            raise ShapeError(
                f"perm must hold {self.numel} integers, not {list(perm.shape)} of {perm.dtype}."
            )
        perm = perm.to(torch.long)
        identity = torch.arange(self.numel, device=perm.device)
        inside = int(perm.min()) >= 0 and int(perm.max()) < self.numel
        seen = torch.zeros(self.numel, dtype=torch.bool, device=perm.device)
        if not inside or not bool(seen.index_fill_(0, perm, True).all()):
            raise OptionError(f"perm is not a permutation of 0 ... {self.numel - 1}.")
        object.__setattr__(self, "perm", None if torch.equal(perm, identity) else perm)

    @classmethod
    def for_weight_and_bias(
        cls, out: int, inp: int, bias: bool = True, *, groups: int = 1
    ) -> MatrixView:
        """The view ``[W b]`` of the vector ``[W.flatten(), b]`` with ``W`` ``[out, inp]``.

        ``out`` counts all rows of ``W``; with ``groups > 1`` each group takes ``out / groups`` of
        them, one after the other (grouped convolution).
        """
        if out % groups:
            raise OptionError(f"{out} outputs do not fall into {groups} equal groups.")
        if not bias:
            return cls(groups, out // groups, inp)
        index = torch.arange(out * inp, device="cpu").reshape(out, inp)
        column = torch.arange(out * inp, out * inp + out, device="cpu").unsqueeze(1)
        return cls(groups, out // groups, inp + 1, torch.cat([index, column], dim=1).flatten())

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.groups, self.out, self.inp)

    @property
    def numel(self) -> int:
        return self.groups * self.out * self.inp

    def to_matrix(self, vectors: Tensor) -> Tensor:
        """``[d, k]`` in parameter order -> ``[k, groups, out, inp]``."""
        self._check_rows(vectors.shape[0])
        if self.perm is not None:
            vectors = vectors[self.perm.to(vectors.device)]
        return vectors.mT.reshape(-1, *self.shape)

    def from_matrix(self, matrices: Tensor) -> Tensor:
        """``[k, groups, out, inp]`` -> ``[d, k]`` in parameter order."""
        if matrices.shape[1:] != self.shape:
            raise ShapeError(
                f"This view is of {list(self.shape)}, not of {list(matrices.shape[1:])}."
            )
        flat = matrices.reshape(matrices.shape[0], self.numel).mT
        if self.perm is None:
            return flat
        vectors = torch.empty_like(flat, memory_format=torch.contiguous_format)
        vectors[self.perm.to(flat.device)] = flat
        return vectors

    def to_stack(self, vectors: Tensor) -> Tensor:
        """``[d, k]`` -> ``[groups, out, inp, k]``: the columns last, as matrix products like it."""
        self._check_rows(vectors.shape[0])
        if self.perm is not None:
            vectors = vectors[self.perm.to(vectors.device)]
        return vectors.reshape(*self.shape, vectors.shape[1])

    def from_stack(self, stack: Tensor) -> Tensor:
        """``[groups, out, inp, k]`` -> ``[d, k]``."""
        flat = stack.reshape(self.numel, stack.shape[-1])
        if self.perm is None:
            return flat
        vectors = torch.empty_like(flat)
        vectors[self.perm.to(flat.device)] = flat
        return vectors

    def matrix(self, vector: Tensor) -> Tensor:
        """One vector ``[d]`` -> ``[groups, out, inp]``."""
        return self.to_stack(vector.unsqueeze(1)).squeeze(-1)

    def vector(self, matrix: Tensor) -> Tensor:
        """``[groups, out, inp]`` -> one vector ``[d]``."""
        return self.from_stack(matrix.unsqueeze(-1)).squeeze(1)

    def dense_to_matrix(self, dense: Tensor) -> Tensor:
        """Rows and columns ``[d, d]`` in parameter order -> in the order of the view."""
        if self.perm is None:
            return dense
        perm = self.perm.to(dense.device)
        return dense[perm][:, perm]

    def dense_from_matrix(self, dense: Tensor) -> Tensor:
        """Rows and columns ``[d, d]`` in the order of the view -> in parameter order."""
        if self.perm is None:
            return dense
        if self._is_weight_and_bias():  # four blocks to copy, much faster than two permutations
            out, inp = self.groups * self.out, self.inp - 1
            weights = out * inp
            parts = dense.reshape(out, inp + 1, out, inp + 1)
            result = torch.empty_like(dense)
            inner = result[:weights, :weights].unflatten(1, (out, inp)).unflatten(0, (out, inp))
            inner.copy_(parts[:, :inp, :, :inp])
            result[:weights, weights:].unflatten(0, (out, inp)).copy_(parts[:, :inp, :, inp])
            result[weights:, :weights].unflatten(1, (out, inp)).copy_(parts[:, inp, :, :inp])
            result[weights:, weights:] = parts[:, inp, :, inp]
            return result
        back = torch.argsort(self.perm).to(dense.device)
        return dense[back][:, back]

    def _is_weight_and_bias(self) -> bool:
        """Whether the vector order is ``[W.flatten(), b]``."""
        standard = (
            MatrixView.for_weight_and_bias(self.groups * self.out, self.inp - 1, groups=self.groups)
            if self.inp > 1
            else None
        )
        return standard is not None and self == standard

    def _check_rows(self, rows: int) -> None:
        if rows != self.numel:
            raise ShapeError(
                f"A view of {list(self.shape)} takes vectors of {self.numel}, not {rows}."
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatrixView):
            return NotImplemented
        if self is other:
            return True
        if self.shape != other.shape or (self.perm is None) != (other.perm is None):
            return False
        if self.perm is None or other.perm is None:
            return True
        return torch.equal(self.perm.cpu(), other.perm.cpu())

    def __hash__(self) -> int:
        return hash(self.shape)

    def __repr__(self) -> str:
        order = "" if self.perm is None else ", permuted"
        return f"MatrixView(groups={self.groups}, out={self.out}, inp={self.inp}{order})"
