"""What this machine offers curvscope, and whether curvscope computes correctly on it."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from .memory import available_bytes, format_bytes

# distribution -> (module, least version); the same as in pyproject.toml, which a test looks at
REQUIRED = {
    "torch": ("torch", "2.11"),
    "backpack-for-pytorch": ("backpack", "1.7.1"),
    "numpy": ("numpy", "1.26"),
    "scipy": ("scipy", "1.11"),
    "pandas": ("pandas", "2.1"),
    "matplotlib": ("matplotlib", "3.8"),
    "scikit-learn": ("sklearn", "1.3"),
    "psutil": ("psutil", "5.9"),
    "safetensors": ("safetensors", "0.4.3"),
    "tqdm": ("tqdm", "4.66"),
    "rich": ("rich", "13"),
    "typer": ("typer", "0.12"),
    "jinja2": ("jinja2", "3.1"),
}
OPTIONAL = {
    "jupyterlab": "notebooks",
    "ipywidgets": "explorers and progress bars in notebooks",
    "transformers": "models of Hugging Face as problems",
    "lightning": "a callback for its trainer",
    "tensorboard": "handing a run to TensorBoard",
    "wandb": "handing a run to Weights & Biases",
    "curvlinops-for-pytorch": "a second opinion in the tests",
    "nngeometry": "a second opinion in the tests",
    "pyhessian": "a second opinion in the tests",
    "hessian-eigenthings": "a second opinion in the tests",
    "mkdocs-material": "building the documentation",
    "pytest": "running the tests",
}
"""Packages that curvscope works without: what each adds."""

_LITTLE_MEMORY = 2**30


@dataclass(frozen=True)
class Package:
    """An installed or missing package: ``purpose`` says what it is for, ``problem`` what is wrong.

    ``version`` is empty if it is not there.
    """

    name: str
    version: str
    purpose: str
    required: bool
    problem: str = ""


@dataclass(frozen=True)
class Device:
    """Something to compute on. ``memory`` and ``free`` are bytes."""

    name: str
    description: str
    memory: int
    free: int
    problem: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`examine` found. ``problems`` must be mended, ``advice`` may be followed."""

    curvscope: str
    python: str
    system: str
    cores: int
    threads: int
    disk: int
    packages: list[Package]
    devices: list[Device]
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def healthy(self) -> bool:
        """Whether nothing has to be mended."""
        return not self.problems

    def __str__(self) -> str:
        lines = [
            f"curvscope {self.curvscope}, Python {self.python}, {self.system}",
            f"{self.cores} processors, torch computes with {self.threads} threads; "
            f"{format_bytes(self.disk)} free on the disk of this folder",
            "",
            "Devices",
        ]
        for device in self.devices:
            told = device.problem or f"{format_bytes(device.free)} of "
            told += "" if device.problem else f"{format_bytes(device.memory)} free"
            lines.append(f"  {device.name:<8} {device.description}: {told}")
        width = max((len(package.name) for package in self.packages), default=0)
        for title, required in (("Required packages", True), ("Optional packages", False)):
            lines += ["", title]
            for one in (p for p in self.packages if p.required is required):
                text = f"  {one.name:<{width}}  {one.version or 'missing':<12} "
                lines.append((text + (one.problem or one.purpose)).rstrip())
        lines += ["", *(f"Advice: {text}" for text in self.advice)]
        lines += [f"Problem: {text}" for text in self.problems]
        if self.healthy:
            lines.append(
                "All is well: a small network's matrices pass every check on this machine."
            )
        return "\n".join(lines)


def examine() -> Diagnosis:
    """Versions, devices and memory, and a check of a small network's matrices.

    Cost: a few seconds, most of them for importing every required package once.
    """
    start = time.perf_counter()
    packages = [_required(name, *facts) for name, facts in REQUIRED.items()]
    packages += [Package(name, _version(name), use, False) for name, use in OPTIONAL.items()]
    problems = [f"{one.name}: {one.problem}" for one in packages if one.problem]
    advice: list[str] = []
    devices, threads = [], 0
    if not any(one.name == "torch" and one.problem for one in packages):
        import torch

        threads = torch.get_num_threads()
        devices = _devices()
        problems += [f"{one.name}: {one.problem}" for one in devices if one.problem]
        if not problems:
            problems += _computes()
        if devices[0].free < _LITTLE_MEMORY:
            advice.append(
                f"Only {format_bytes(devices[0].free)} of memory are free: take few samples "
                "(--samples), and set memory= of the matrices."
            )
        cores = _cores()
        if threads > cores:
            advice.append(
                f"torch uses {threads} threads on {cores} processors, which slows it down: set "
                f"OMP_NUM_THREADS={cores} or give --threads {cores}."
            )
    from . import __version__

    return Diagnosis(
        curvscope=__version__,
        python=platform.python_version(),
        system=platform.platform(terse=True),
        cores=_cores(),
        threads=threads,
        disk=shutil.disk_usage(Path.cwd()).free,
        packages=packages,
        devices=devices,
        problems=problems,
        advice=advice,
        seconds=time.perf_counter() - start,
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _required(name: str, module: str, least: str) -> Package:
    purpose = f"at least {least}"
    version = _version(name)
    if not version:
        text = f"it is not installed; pip install '{name}>={least}'"
        return Package(name, "", purpose, True, text)
    if _parts(version) < _parts(least):
        text = f"{version} is too old; pip install --upgrade '{name}>={least}'"
        return Package(name, version, purpose, True, text)
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever a broken installation raises
        text = f"importing it fails with {type(error).__name__}: {error}; install it again"
        return Package(name, version, purpose, True, text)
    return Package(name, version, purpose, True)


def _parts(version: str) -> tuple[int, ...]:
    """The leading numbers: ``"2.13.0+cpu"`` -> ``(2, 13, 0)``."""
    numbers = []
    for part in version.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _devices() -> list[Device]:
    import psutil
    import torch

    cpu = platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total
    found = [Device("cpu", cpu, memory, available_bytes(), _fails("cpu"))]
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        name = f"cuda:{number}"
        try:
            facts = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            found.append(Device(name, facts.name, total, free, _fails(name)))
        except RuntimeError as error:
            found.append(Device(name, "a GPU", 0, 0, str(error).splitlines()[0]))
    return found


def _fails(device: str) -> str:
    """Why double backward gives no or a wrong number there, or nothing."""
    import torch

    try:
        x = torch.arange(1.0, 4.0, dtype=torch.float64, device=device, requires_grad=True)
        (first,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
        right = torch.allclose(second.cpu(), torch.tensor([6.0, 12.0, 18.0], dtype=torch.float64))
    except Exception as error:  # drivers raise what they like
        return f"computing fails with {type(error).__name__}: {str(error).splitlines()[0]}"
    return "" if right else "a second derivative computed there is wrong"


def _computes() -> list[str]:
    """Checks of a small network that do not pass."""
    import torch
    from torch import nn

    from .analysis import verify
    from .problem import Problem

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(3, (8,), generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    try:
        result = verify(Problem(model, nn.CrossEntropyLoss(), (inputs, targets)))
    except Exception as error:  # that is what a doctor is for
        return [f"Checking a small network fails with {type(error).__name__}: {error}"]
    return [] if result.trusted else [f"A small network's matrices are wrong here: {result}"]


def as_dict(diagnosis: Diagnosis) -> dict[str, Any]:
    """The diagnosis in types that JSON has."""
    from .analysis.result import plain

    return {**plain(diagnosis), "healthy": diagnosis.healthy}
