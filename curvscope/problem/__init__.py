"""The only place that loops over data, moves tensors, and knows what the loss averages over."""

from .problem import Problem, Snapshot, flat_gradient, require_problem

__all__ = ["Problem", "Snapshot", "flat_gradient", "require_problem"]
