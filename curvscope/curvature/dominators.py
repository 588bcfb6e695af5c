"""Places in an autograd graph that everything from somewhere to the loss passes through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..layers import SampleAxis

_NODE = 3000.0  # numbers that are computed in the time that it takes to start an operation


@dataclass(eq=False)
class Place:
    """An operation's output in the graph of a loss.

    ``above`` is its closest dominator: every way from the loss to this place leads through it.
    """

    node: Any
    slots: set[int] = field(default_factory=set)  # which of the operation's outputs are used
    before: list[Place] = field(default_factory=list)  # one step closer to the loss
    above: Place | None = None
    depth: int = 0
    axis: SampleAxis | None = None
    gradient: Tensor | None = None
    hessian: Tensor | None = None  # [N, k, k]
    _behind: float = -1.0

    @property
    def slot(self) -> int:
        return next(iter(self.slots))

    @property
    def edge(self) -> GradientEdge:
        return GradientEdge(self.node, self.slot)

    def chain(self) -> list[Place]:
        """The dominators, the closest first, without the loss itself."""
        found, place = [], self.above
        while place is not None and place.above is not None:
            found.append(place)
            place = place.above
        return found

    def described(self) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and type of its value; ``None`` where torch does not say or it is not one only."""
        about = getattr(self.node, "_input_metadata", ())
        if len(self.slots) != 1 or len(about) <= self.slot:
            return None
        shape = tuple(about[self.slot].shape)
        return (shape, about[self.slot].dtype) if all(type(s) is int for s in shape) else None

    @property
    def behind(self) -> float:
        """Time of a pass from the loss to this place, in numbers to be computed."""
        if self._behind < 0:
            seen, stack, self._behind = {self}, [self], 0.0
            while stack:
                for other in stack.pop().before:
                    if other not in seen:
                        seen.add(other)
                        stack.append(other)
                        self._behind += _weight(other.node)
        return self._behind


_VIEWS = ("View", "Transpose", "Permute", "queeze", "Select", "Expand", "Clone", "Alias", "TBackw")


def _weight(node: Any) -> float:
    if any(part in node.name() for part in _VIEWS):
        return _NODE
    about = getattr(node, "_input_metadata", ())
    return _NODE + sum(torch.Size(each.shape).numel() for each in about)


def dominators(root: Any) -> dict[Any, Place]:
    """The places of the graph behind the node ``root``, each with its closest dominator.

    In an order in which all ways to a node are known, its dominator is the common one of those
    before it (Cooper, Harvey and Kennedy 2001, for graphs without cycles).
    """
    order, seen, stack = [], {root}, [(root, iter(root.next_functions))]
    while stack:
        node, followers = stack[-1]
        for follower, _ in followers:
            if follower is not None and follower not in seen:
                seen.add(follower)
                stack.append((follower, iter(follower.next_functions)))
                break
        else:
            order.append(node)
            stack.pop()
    places = {node: Place(node) for node in reversed(order)}
    for place in places.values():
        if place.above is not None:
            place.depth = place.above.depth + 1
        for follower, slot in place.node.next_functions:
            if follower is not None:
                other = places[follower]
                other.slots.add(slot)
                other.before.append(place)
                other.above = place if other.above is None else _common(other.above, place)
    return places


def _common(left: Place, right: Place) -> Place:
    """The closest place that dominates both."""
    while left is not right:
        if left.depth < right.depth:
            left, right = right, left
        assert left.above is not None
        left = left.above
    return left
