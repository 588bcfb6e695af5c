"""The pictures behind :mod:`curvscope.plot`, one module per kind of result."""
