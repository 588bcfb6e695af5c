"""Files from which an interrupted computation goes on, without pickled code in them."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError, OutputError
from ...operators import Operator
from .common import Meter, normals, title

_SECONDS = 20.0  # between two writings
_FORMAT = 2


class Keeper:
    """Writes the state of a computation now and then, and when it is interrupted.

    ``hold`` is called with a state that is complete: tensors that nobody changes afterwards, and
    plain numbers. Without a path it does nothing.
    """

    def __init__(
        self, path: str | os.PathLike[str] | None, meter: Meter, settings: Mapping[str, Any]
    ) -> None:
        self.path = Path(path) if path is not None else None
        self._last = time.monotonic()
        self._state: dict[str, Any] | None = None
        if self.path is None:
            return
        if not self.path.parent.is_dir():
            raise OutputError(
                f"checkpoint={str(path)!r}: the folder {self.path.parent} is missing."
            )
        self._meta = {"format": _FORMAT, **_matrix(meter.op), "settings": dict(settings)}
        self._print = _fingerprint(meter)

    def load(self) -> dict[str, Any] | None:
        """The state that an earlier run of the same computation has left, if there is one."""
        if self.path is None or not self.path.exists():
            return None
        try:
            with warnings.catch_warnings():  # of foreign formats, which end in an error below
                warnings.simplefilter("ignore")
                content = torch.load(self.path, map_location="cpu", weights_only=True)
            meta = json.loads(content["meta"])
            seen, numbers = content["fingerprint"], json.loads(content["numbers"])
            state = {**numbers, **content["tensors"]}
        except Exception as error:
            raise DataError(
                f"{self.path} is no checkpoint of this package ({type(error).__name__}); delete it "
                "or name another file."
            ) from error
        for name, value in self._meta.items():
            if json.loads(json.dumps(value)) != meta.get(name):
                raise DataError(
                    f"The checkpoint {self.path} is of another computation: its {name} is "
                    f"{meta.get(name)!r}, here it is {value!r}. Delete it, name another file, or "
                    "call with the same arguments."
                )
        eps = torch.finfo(getattr(torch, self._meta["dtype"])).eps
        if float((seen - self._print).norm()) > 100 * eps**0.75 * float(seen.norm()):
            raise DataError(
                f"The checkpoint {self.path} is of another matrix: a product with the same vector "
                "differs, so the data, the parameters or the loss have changed. Delete it or name "
                "another file."
            )
        self._state = state
        return state

    def hold(self, **state: Any) -> None:
        """Remember a complete state; it is written when some time has passed."""
        if self.path is None:
            return
        self._state = state
        if time.monotonic() - self._last > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write the last state that was held, as one whole file or not at all."""
        if self.path is None or self._state is None:
            return
        tensors = {k: _saved(v) for k, v in self._state.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in self._state.items() if not isinstance(v, Tensor)}
        content = {
            "meta": json.dumps(self._meta),
            "fingerprint": self._print,
            "numbers": json.dumps(numbers),
            "tensors": tensors,
        }
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(content, file)
            os.replace(name, self.path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._last = time.monotonic()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the computation, its last state is written."""
        try:
            yield
        finally:
            self.write()


def _saved(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().clone()  # a view would be written with all that lies behind it


def _matrix(op: Operator) -> dict[str, Any]:
    return {"of": title(op), "size": op.shape[0], "dtype": str(op.dtype).removeprefix("torch.")}


def _fingerprint(meter: Meter) -> Tensor:
    """A few linear functions of one product."""
    image = meter(normals(meter.op, 0, 0, 1, stream=99))[:, 0].double().cpu()
    weights = torch.arange(1, len(image) + 1, dtype=torch.float64)
    waves = [torch.cos(weights * k * 0.7071) for k in range(4)]
    return torch.stack([image @ wave for wave in waves] + [image.norm()])
