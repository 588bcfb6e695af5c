"""The folder of a run: complete, readable at any time, honest about damage."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import curvscope as cs
from curvscope.errors import OptionError, OutputError, RunError
from curvscope.training import lines, store
from curvscope.training.store import Writer

HEAD = {"format": 1, "id": "a", "name": "n", "initial": "x", "fingerprint": {"optimizer": "SGD"}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k != "seconds"} for r in cs.Run(path).records]


def written(path: Path, steps: int = 4) -> Path:
    """A run with one row and one record of two rows and a tensor per step."""
    writer = Writer(path, HEAD)
    for step in range(1, steps + 1):
        writer.append(step, "loss", [{"loss": step / 2}])
        two = [{"block": "a", "error": 0.1}, {"block": "b", "error": 0.2}]
        writer.append(step, "error", two, {"t": torch.full((3,), float(step))})
    writer.close()
    return path


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    row = {
        "block": 'schicht "ü"\n',
        "nan": math.nan,
        "large": math.inf,
        "small": -math.inf,
        "x": 0.1 + 0.2,
        "n": 3,
        "yes": True,
        "list": [1.5, math.nan],
        "tensor": torch.tensor(2.5),
    }
    writer = Writer(tmp_path / "r", HEAD)
    writer.append(7, "m", [row])
    back = cs.Run(tmp_path / "r").records[0]
    assert back["step"] == 7 and back["measure"] == "m"
    assert math.isnan(back["nan"]) and back["large"] == math.inf and back["small"] == -math.inf
    assert back["x"] == 0.1 + 0.2 and back["n"] == 3 and back["yes"] is True
    assert back["block"] == row["block"] and back["list"] == [1.5, None] and back["tensor"] == 2.5
    writer.close()


def test_pandas_reads_the_file_as_it_is(tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    frame = pd.read_json(path / "records.jsonl", lines=True)
    assert frame.query("measure == 'loss'")["loss"].tolist() == [0.5, 1.0, 1.5, 2.0]
    own = cs.Run(path).frame("error")
    assert own["error"].tolist() == [0.1, 0.2] * 4 and "crc" not in own and "loss" not in own


def test_every_prefix_of_the_file_gives_the_finished_records(tmp_path: Path) -> None:
    content = (written(tmp_path / "r", 2) / "records.jsonl").read_bytes()
    whole = lines.scan(content, "f").rows
    ends = [0]  # where records end: after 1, 3, 4, 6 lines
    positions = [k + 1 for k, byte in enumerate(content) if byte == ord("\n")]
    ends += [positions[k - 1] for k in (1, 3, 4, 6)]
    counts = dict(zip(ends, (0, 1, 3, 4, 6)))
    for cut in range(len(content) + 1):
        found = lines.scan(content[:cut], "f")
        end = max(e for e in ends if e <= cut)
        assert found.end == end and found.rows == whole[: counts[end]] and not found.problems


def test_a_torn_end_is_cut_off_when_the_run_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    file = path / "records.jsonl"
    complete = file.read_bytes()
    last = complete.splitlines(keepends=True)
    # killed within the second line of the record of two
    file.write_bytes(b"".join(last[:-1]) + last[-1][:20])
    assert cs.Run(path).frame("error")["step"].max() == 3 and not cs.Run(path).problems
    writer = Writer(path, HEAD)
    assert file.read_bytes() == b"".join(last[:-2]) and writer.last_step == 4
    writer.append(5, "loss", [{"loss": 9.0}])
    writer.close()
    run = cs.Run(path)
    assert run.frame("loss")["loss"].tolist() == [0.5, 1.0, 1.5, 2.0, 9.0] and not run.problems


@pytest.mark.parametrize("damage", ["changed", "binary", "joined"])
def test_a_damaged_line_is_named_and_the_rest_is_read(damage: str, tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    file = path / "records.jsonl"
    parts = file.read_bytes().splitlines(keepends=True)
    assert b'"loss":1.0' in parts[3]
    parts[3] = {
        "changed": parts[3].replace(b'"loss":1.0', b'"loss":1.1'),
        "binary": b"\x00\xff" * 10 + b"\n",
        "joined": parts[3][:-5] + b"\n",
    }[damage]
    file.write_bytes(b"".join(parts))
    run = cs.Run(path)
    assert len(run.problems) == 1 and "records.jsonl, line 4" in run.problems[0]
    assert run.frame("loss")["step"].tolist() == [1, 3, 4] and len(run.frame("error")) == 8
    Writer(path, HEAD).close()  # continuing cuts nothing off
    assert file.read_bytes() == b"".join(parts)


def test_a_damaged_or_missing_tensor_file_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "r")
    files = sorted((path / "tensors").iterdir())
    files[1].write_bytes(files[1].read_bytes()[:10])
    files[2].unlink()
    run = cs.Run(path)
    found = [run.tensors(row).get("t") for row in run.frame("error").to_dict("records")][::2]
    assert [None if t is None else float(t[0]) for t in found] == [1.0, None, None, 4.0]
    text = " ".join(run.problems)
    assert files[1].name in text and "damaged" in text
    assert files[2].name in text and "missing" in text
    assert len(run.frame("error")) == 8


def test_restarts_leave_no_duplicates(tmp_path: Path) -> None:
    path = written(tmp_path / "r", 4)
    writer = Writer(path, HEAD)
    assert writer.last_step == 4
    writer.append(2, lines.CONTINUED, [{"superseded_up_to": 4}])
    for step in (3, 4):
        writer.append(step, "loss", [{"loss": 10.0 + step}])
        writer.append(step, "error", [{"block": "a", "error": 1.0}], {"t": torch.zeros(1)})
    writer.close()
    run = cs.Run(path)
    assert run.frame("loss")["loss"].tolist() == [0.5, 1.0, 13.0, 14.0]
    assert run.frame("error")["step"].tolist() == [1, 1, 2, 2, 3, 4]
    everything = cs.Run(path, superseded=True)
    assert everything.frame("loss")["step"].tolist() == [1, 2, 3, 4, 3, 4]
    # the tensors of before are still there, those of after under names of their own
    tensors = [everything.tensors(r).get("t") for r in everything.rows("error")]
    assert len([t for t in tensors if t is not None]) == 6


def test_restarts_are_seen_even_if_the_marker_is_damaged(tmp_path: Path) -> None:
    path = written(tmp_path / "r", 4)
    writer = Writer(path, HEAD)
    writer.append(2, lines.CONTINUED, [{"superseded_up_to": 4}])
    writer.append(3, "loss", [{"loss": 13.0}])
    writer.close()
    file = path / "records.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"superseded_up_to":4', b'"superseded_up_to":5'))
    run = cs.Run(path)
    assert len(run.problems) == 1 and run.frame("loss")["loss"].tolist() == [0.5, 1.0, 13.0]


def test_folders_that_are_no_run_or_another_one(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"has no run\.json"):
        cs.Run(tmp_path / "nothing")
    path = written(tmp_path / "r")
    with pytest.raises(RunError, match=r'another run.*optimizer: "SGD" there, "Adam" here'):
        Writer(path, {**HEAD, "fingerprint": {"optimizer": "Adam"}})
    (path / "run.json").write_text("{")
    with pytest.raises(RunError, match="damaged"):
        cs.Run(path)
    (path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(RunError, match="format 99"):
        cs.Run(path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(RunError, match=r"thesis\.tex but no run\.json"):
        Writer(tmp_path / "mine", HEAD)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made a folder"):
        Writer(tmp_path / "file" / "r", HEAD)


def test_one_writer_at_a_time_and_readers_meanwhile(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "r", HEAD)
    with pytest.raises(RunError, match="being written"):
        Writer(tmp_path / "r", HEAD)
    writer.append(1, "loss", [{"loss": 1.0}])
    run = cs.Run(tmp_path / "r")
    assert run.last_step == 1
    writer.append(2, "loss", [{"loss": 2.0}])
    assert run.last_step == 1 and run.refresh().last_step == 2
    writer.close()
    Writer(tmp_path / "r", HEAD).close()


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Writer(tmp_path / "r", HEAD)
    writer.append(1, "loss", [{"loss": 1.0}])
    before = (tmp_path / "r" / "records.jsonl").read_bytes()

    def half(handle: int, content: bytes) -> None:
        os.write(handle, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "_write", half)
    for tensors in (None, {"t": torch.zeros(4)}):
        with pytest.raises(OSError, match="No space left"):
            writer.append(2, "loss", [{"loss": 2.0}], tensors)
        assert (tmp_path / "r" / "records.jsonl").read_bytes() == before
        assert list((tmp_path / "r" / "tensors").iterdir()) == []


def test_what_a_run_says_of_itself(tmp_path: Path) -> None:
    run = cs.Run(written(tmp_path / "r"))
    assert run.measures == ("loss", "error") and run.steps == (1, 2, 3, 4)
    assert repr(run).endswith("n: 12 rows of 2 measures up to step 4)")
    with pytest.raises(OptionError, match=r"no record of 'eror'.* Did you mean 'error'"):
        run.frame("eror")
    assert run.alarms.empty and run.spectra() == {} and len(run.snapshots()) == 0


def test_exports_name_the_package_that_is_missing(tmp_path: Path, monkeypatch: Any) -> None:
    import builtins

    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name in ("wandb", "torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    run = cs.Run(written(tmp_path / "r"))
    with pytest.raises(cs.errors.MissingPackageError, match="pip install tensorboard"):
        run.to_tensorboard(tmp_path / "tb")
    with pytest.raises(cs.errors.MissingPackageError, match="pip install wandb"):
        run.to_wandb()


def test_export_to_something_like_wandb(tmp_path: Path, monkeypatch: Any) -> None:
    import sys
    import types

    logged: list[Any] = []
    session = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.SimpleNamespace(init=lambda **options: logged.append(options) or session)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert cs.Run(written(tmp_path / "r", 2)).to_wandb(project="p") == 6
    assert logged[0]["project"] == "p" and logged[-1] == "end"
    assert logged[1] == (1, {"loss/loss": 0.5, "error/error/a": 0.1, "error/error/b": 0.2})


def test_export_to_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert cs.Run(written(tmp_path / "r")).to_tensorboard(tmp_path / "tb") == 12
    assert list((tmp_path / "tb").iterdir())
