"""The problems that read files, on tiny files written here."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import curvscope as cs
from curvscope import zoo
from curvscope.errors import DataError, NotDefinedError
from curvscope.zoo import datasets, files

RNG = np.random.default_rng(0)


def images(count: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, *shape), dtype=np.uint8)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.data


def write_mnist(folder: Path, *, end: str = "", sep: str = "-") -> dict[str, np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"train": images(9, 28, 28), "t10k": images(4, 28, 28)}
    for stem, array in content.items():
        raw = idx(array)
        name = f"{stem}-images{sep}idx3-ubyte{end}"
        (folder / name).write_bytes(gzip.compress(raw) if end else raw)
    return content


def cifar_batch(count: int, *, text_keys: bool = False) -> dict[object, object]:
    batch = {"data": images(count, 3072), "labels": RNG.integers(0, 10, count).tolist()}
    return dict(batch) if text_keys else {k.encode(): v for k, v in batch.items()}


def write_cifar(folder: Path, *, protocol: int = 2) -> dict[str, dict[object, object]]:
    folder.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    content = {name: cifar_batch(3) for name in names}
    for name, batch in content.items():
        (folder / name).write_bytes(pickle.dumps(batch, protocol=protocol))
    return content


# -- MNIST ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["", "MNIST/raw", "raw"])
@pytest.mark.parametrize("end", ["", ".gz"])
@pytest.mark.parametrize("sep", ["-", "."])
def test_mnist_idx(tmp_path: Path, place: str, end: str, sep: str) -> None:
    content = write_mnist(tmp_path / place, end=end, sep=sep)
    data = datasets.mnist_images(tmp_path)
    for split, stem in ((data.train, "train"), (data.test, "t10k")):
        inputs, targets = split.take(slice(None))
        assert torch.equal(inputs, torch.from_numpy(content[stem]).reshape(-1, 784) / 255)
        assert torch.equal(inputs, targets)
        assert inputs.dtype == torch.float32


@pytest.mark.parametrize("shape", [(28, 28), (784,), (1, 28, 28)])
def test_mnist_npz(tmp_path: Path, shape: tuple[int, ...]) -> None:
    train, test = images(5, *shape), images(2, *shape)
    np.savez(tmp_path / "mnist.npz", train_images=train, test_images=test)
    for place in (tmp_path, tmp_path / "mnist.npz"):
        data = datasets.mnist_images(place)
        assert torch.equal(data.train.raw, torch.from_numpy(train).reshape(5, 784))
        assert len(data.test) == 2


def test_autoencoder(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    problem = zoo.load("mnist-autoencoder", data=tmp_path, trained=False, samples=5)
    assert problem.layout.numel == 2_837_314
    assert problem.n_samples == 5
    layers = [m for m in problem.model if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == [1000, 500, 250, 30, 250, 500, 1000, 784]
    # ReLU after all layers but the code and the output.
    names = [name for name, _ in problem.model.named_children()]
    assert [n for n in names if n.startswith("act")] == [f"act{i}" for i in (1, 2, 3, 5, 6, 7)]
    # The objective by hand: summed over pixels, averaged over samples.
    inputs, targets = problem.dataset.train.take(slice(5))
    with torch.no_grad():
        p = problem.model(inputs).double().sigmoid()
    y = targets.double()
    by_hand = -(y * p.log() + (1 - y) * (1 - p).log()).sum(1).mean()
    assert problem.objective() == pytest.approx(float(by_hand), rel=1e-5)
    with pytest.raises(NotDefinedError, match="does not classify"):
        problem.accuracy()
    assert problem.train(epochs=1)[0] == pytest.approx(float(by_hand), rel=0.2)


# -- CIFAR-10 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_batches(tmp_path: Path, inside: bool, protocol: int) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    content = write_cifar(folder, protocol=protocol)
    data = datasets.cifar10(folder if inside else tmp_path)
    assert (len(data.train), len(data.test)) == (15, 3)
    third = content["data_batch_3"]
    expected = np.asarray(third[b"data"]).reshape(3, 3, 32, 32)
    assert torch.equal(data.train.raw[6:9], torch.from_numpy(expected))
    assert data.train.labels[6:9].tolist() == third[b"labels"]
    inputs, labels = data.train.take(torch.tensor([6]))
    pixel = (expected[0, 2, 4, 5] / 255 - 0.4465) / 0.2616
    assert float(inputs[0, 2, 4, 5]) == pytest.approx(pixel, rel=1e-5)
    assert labels.dtype == torch.int64


def python_2_pickle(pixels: bytes, label: int) -> bytes:
    """One image as the original files hold it: 8-bit strings, and NumPy's module of that time."""
    return b"".join(
        [
            b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n",
            b"K\x00\x85U\x01b\x87R(K\x01K\x01M\x00\x0c\x86",  # version 1, shape (1, 3072)
            b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN",
            b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89",
            b"T" + struct.pack("<I", len(pixels)) + pixels + b"tb",
            b"U\x06labels]K" + bytes([label]) + b"au.",
        ]
    )


def test_cifar_batches_pickled_by_python_2(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    pixels = images(3072)
    (folder / "data_batch_1").write_bytes(python_2_pickle(pixels.tobytes(), 7))
    data = datasets.cifar10(tmp_path)
    assert len(data.train) == 13
    assert torch.equal(data.train.raw[0].flatten(), torch.from_numpy(pixels))
    assert int(data.train.labels[0]) == 7


class Attack:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (self.marker,))  # type: ignore[return-value]


def test_cifar_pickles_cannot_run_code(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    marker = tmp_path / "ran"
    payload = pickle.dumps({b"data": Attack(marker), b"labels": []}, protocol=2)
    (folder / "data_batch_2").write_bytes(payload)
    with pytest.raises(DataError, match=r"data_batch_2.*no CIFAR batch needs"):
        datasets.cifar10(tmp_path)
    assert not marker.exists()
    pickle.loads(payload)  # the payload does work
    assert marker.exists()


@pytest.mark.parametrize("channels_last", [True, False])
def test_cifar_npz(tmp_path: Path, channels_last: bool) -> None:
    train, test = images(6, 3, 32, 32), images(3, 3, 32, 32)
    stored = [x.transpose(0, 2, 3, 1) if channels_last else x for x in (train, test)]
    np.savez(
        tmp_path / "subset.npz",
        train_images=stored[0],
        test_images=stored[1],
        train_labels=np.arange(6),
        test_labels=np.arange(3, dtype=np.uint8),
    )
    data = datasets.cifar10(tmp_path)
    assert torch.equal(data.train.raw, torch.from_numpy(train))
    assert data.test.labels.tolist() == [0, 1, 2]


def test_resnet20(tmp_path: Path) -> None:
    write_cifar(tmp_path / "cifar-10-batches-py")
    problem = zoo.load("cifar10-resnet20", data=tmp_path, trained=False, samples=4)
    assert problem.layout.numel == 269_722
    convolutions = [m for m in problem.model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convolutions) == 19
    start = problem.objective()
    problem.train(epochs=2)
    assert problem.objective() != start
    assert 0 <= problem.accuracy() <= 1


def test_option_a_shortcut() -> None:
    from curvscope.zoo.models import PadShortcut

    x = torch.arange(2 * 2 * 4 * 4.0).reshape(2, 2, 4, 4)
    y = PadShortcut(extra=3, stride=2)(x)
    assert y.shape == (2, 5, 2, 2)
    assert torch.equal(y[:, 1:3], x[:, :, ::2, ::2])
    assert not y[:, 0].any() and not y[:, 3:].any()


# -- text ----------------------------------------------------------------------------------------


def test_text_windows(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("cba" * 200, encoding="utf-8")
    (tmp_path / "a.txt").write_text("aéb" * 200, encoding="utf-8")
    (tmp_path / "c.md").write_text("not read", encoding="utf-8")
    data = datasets.characters(tmp_path, context=10)
    text = "aéb" * 200 + "\n" + "cba" * 200
    assert data.vocabulary == "\nabcé"
    assert data.classes == 5
    assert (len(data.train), len(data.test)) == (108, 12)
    inputs, targets = (
        torch.cat(pair) for pair in zip(*(s.take(slice(None)) for s in (data.train, data.test)))
    )
    assert "".join(data.vocabulary[i] for i in inputs.flatten()) == text[:1200]
    assert "".join(data.vocabulary[i] for i in targets.flatten()) == text[1:1201]
    assert datasets.characters(tmp_path / "b.txt").vocabulary == "abc"


def test_char_transformer(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be. " * 200, encoding="utf-8")
    problem = zoo.load("char-transformer", data=tmp_path, trained=False, samples=3)
    vocabulary = problem.dataset.classes
    assert vocabulary == len(set("to be or not to be. "))
    assert problem.n_samples == 3
    assert problem.n_terms == 3 * 64
    # Untrained, the next character is as good as uniform.
    assert problem.objective() == pytest.approx(np.log(vocabulary), rel=0.05)
    history = problem.train(epochs=8)
    assert history[-1] < 0.9 * history[0]
    assert problem.accuracy() > 1 / vocabulary
    assert len([n for n, _ in problem.model.named_modules() if n.endswith("attention")]) == 4


def test_char_transformer_by_products(tmp_path: Path) -> None:
    """Its last block, compared, concentrated and decomposed as the digits are."""
    (tmp_path / "text.txt").write_text("to be or not to be. " * 200, encoding="utf-8")
    problem = zoo.load("char-transformer", data=tmp_path, trained=False, samples=1)
    ggn = cs.ggn(problem)
    assert problem.layout.numel > 100_000
    options = {"metrics": ["error", "cosine"], "blocks": ["(all)"], "budget": 8}
    kfac = {"K-FAC": cs.kfac(problem)}
    row = cs.compare(ggn, kfac, best_in_class=False, **options).row("(all)", "K-FAC")
    assert row.method["error"] == "estimated" and 0 < row.stderr["error"] < row.error
    top = cs.eigsh(ggn, 1, tol=1e-2)
    density = cs.density(ggn, probes=2, steps=4)
    assert top.converged and float(density.nodes.max()) <= float(top.values[0]) * 1.02
    assert cs.trace(ggn, method="hutchinson", budget=8, tol=0).value > 0


def test_attention_is_causal() -> None:
    from curvscope.zoo.models import CharTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CharTransformer(7, context=6, width=8, heads=2, depth=2).double()
    x = torch.tensor([[0, 1, 2, 3, 4, 5]])
    model.requires_grad_(False)
    z = model(x)
    assert z.shape == (1, 7, 6)
    changed = x.clone()
    changed[0, 3] = 6
    difference = (model(changed) - z).abs().amax(dim=1)[0]
    assert float(difference[:3].max()) == 0
    assert bool((difference[3:] > 0).all())


# -- bad input -----------------------------------------------------------------------------------

READERS = [
    ("mnist-autoencoder", "train-images-idx3-ubyte"),
    ("cifar10-resnet20", "cifar-10-batches-py"),
    ("char-transformer", r"\*\.txt"),
]


@pytest.mark.parametrize(("name", "wanted"), READERS)
def test_missing_data(tmp_path: Path, name: str, wanted: str) -> None:
    with pytest.raises(DataError, match=wanted):
        zoo.load(name)
    with pytest.raises(DataError, match=f"nowhere does not exist.*{wanted}"):
        zoo.load(name, data=tmp_path / "nowhere")
    with pytest.raises(DataError, match=wanted):
        zoo.load(name, data=tmp_path)


def test_mnist_without_its_test_images(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match=r"no test images.*t10k-images-idx3-ubyte"):
        datasets.mnist_images(tmp_path)


GOOD = idx(images(2, 28, 28))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD[:-1], "damaged.*1568.*1567"),
        (GOOD + b"\x00", "damaged"),
        (GOOD[:9], "within its header"),
        (b"\x00\x00\x0d\x03" + GOOD[4:], "not an IDX file"),
        (b"", "not an IDX file"),
        (gzip.compress(GOOD)[:-20], "cannot be read"),
        (gzip.compress(GOOD)[:40] + b"\xff" * 40 + gzip.compress(GOOD)[80:], "cannot be read"),
        (idx(images(2, 27, 28)), "28, 28"),
        (idx(images(0, 28, 28)), "28, 28"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(DataError, match=rf"train-images-idx3-ubyte.*{message}"):
        datasets.mnist_images(tmp_path)


def test_damaged_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(DataError, match=r"x\.npz cannot be read"):
        datasets.cifar10(path)
    np.savez(path, train_images=images(2, 3, 32, 32), test_images=images(2, 3, 32, 32))
    with pytest.raises(DataError, match=r"lacks train_labels, test_labels; it holds train_images"):
        datasets.cifar10(tmp_path)
    np.savez(path, train_images=np.array([Path()], dtype=object), test_images=images(2, 784))
    with pytest.raises(DataError, match="cannot be read"):
        datasets.mnist_images(tmp_path)
    np.savez(tmp_path / "y.npz", a=np.zeros(1))
    with pytest.raises(DataError, match=r"several .npz files \(x.npz, y.npz\)"):
        datasets.cifar10(tmp_path)


def test_truncated_npz(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, train_images=images(9, 784), test_images=images(2, 784))
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(DataError, match=r"x\.npz cannot be read"):
        datasets.mnist_images(path)


@pytest.mark.parametrize(
    ("pictures", "labels", "message"),
    [
        (images(2, 3, 32, 32).astype(np.float32), [0, 1], "uint8"),
        (images(2, 3, 28, 28), [0, 1], "32, 32"),
        (images(2, 3, 32, 32), [0, 1, 2], "as many"),
        (images(2, 3, 32, 32), [0.5, 1.0], "whole-number"),
        (images(2, 3, 32, 32), [0, 10], "0 to 9"),
        (images(2, 3, 32, 32), [-1, 1], "0 to 9"),
        (images(0, 3, 32, 32), np.zeros(0, int), "at least one"),
    ],
)
def test_images_and_labels_are_checked(pictures: np.ndarray, labels: list, message: str) -> None:
    with pytest.raises(DataError, match=f"somewhere.*{message}"):
        files.check_images(
            torch.from_numpy(pictures), torch.as_tensor(np.asarray(labels)), Path("somewhere")
        )


def test_damaged_cifar_batches(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    write_cifar(folder)
    good = (folder / "data_batch_4").read_bytes()
    for content in (good[:-100], b"", b"garbage", pickle.dumps({b"labels": [1]}, protocol=2)):
        (folder / "data_batch_4").write_bytes(content)
        with pytest.raises(DataError, match="data_batch_4"):
            datasets.cifar10(tmp_path)
    wrong = {b"data": images(3, 100), b"labels": [0, 1, 2]}
    (folder / "data_batch_4").write_bytes(pickle.dumps(wrong, protocol=2))
    with pytest.raises(DataError, match=r"\[3, 100\], not \[n, 3072\]"):
        datasets.cifar10(tmp_path)
    (folder / "data_batch_4").unlink()
    (folder / "test_batch").unlink()
    with pytest.raises(DataError, match="lacks data_batch_4, test_batch"):
        datasets.cifar10(tmp_path)


def test_text_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * 128, encoding="utf-8")
    with pytest.raises(DataError, match="128 characters are too few; two windows need 129"):
        datasets.characters(tmp_path)
    path.write_text("x" * 129, encoding="utf-8")
    assert len(datasets.characters(tmp_path).train) == 1
    path.write_bytes(b"\xff\xfe\xfa" * 100)
    with pytest.raises(DataError, match=r"short\.txt cannot be read as UTF-8"):
        datasets.characters(tmp_path)
