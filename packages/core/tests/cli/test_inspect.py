"""`headrace inspect` on real safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from headrace.cli.inspect import summary_json
from headrace.cli.main import app


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Two shards without an index, three dtypes, a scalar, a config."""
    first = {
        "a.weight": torch.zeros(300, 7, dtype=torch.bfloat16),
        "a.scale": torch.zeros((), dtype=torch.float32),
    }
    second = {"b[0].ids": torch.zeros(5, dtype=torch.int64)}
    save_file(first, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file(second, tmp_path / "two.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    return tmp_path


def _invoke(*args: str) -> str:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, ["inspect", *args])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_of_a_sharded_folder(checkpoint: Path) -> None:
    data = json.loads(_invoke(str(checkpoint), "--json"))
    assert (data["num_tensors"], data["num_elements"], data["bytes"]) == (3, 2106, 4244)
    assert data["dtypes"]["bfloat16"] == {"num_tensors": 1, "bytes": 4200}
    assert sorted(data["files"]) == ["one.safetensors", "two.safetensors"]
    assert (data["model_type"], data["architectures"]) == ("qwen3", ["Qwen3ForCausalLM"])
    assert data["metadata"] == {"format": "pt"}
    assert "tensors" not in data
    assert all(f"`{key}`" in (summary_json.__doc__ or "") for key in data)


def test_json_with_tensors(checkpoint: Path) -> None:
    tensors = {t["name"]: t for t in json.loads(_invoke(str(checkpoint), "--json", "--tensors"))["tensors"]}
    assert tensors["a.weight"] == {"name": "a.weight", "dtype": "bfloat16", "shape": [300, 7], "bytes": 4200}
    assert tensors["a.scale"]["shape"] == []


def test_text(checkpoint: Path) -> None:
    text = _invoke(str(checkpoint), "--tensors")
    for part in (
        "qwen3 Qwen3ForCausalLM",
        "3 with 2,106 elements",
        "in 2 files",
        "format=pt",
        "300 x 7",
        "scalar",
    ):
        assert part in text
    assert "b[0].ids" in text


def test_one_file_without_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    text = _invoke(str(checkpoint / "two.safetensors"))
    assert "in 1 file\n" in text
    assert "model " not in text


@pytest.mark.parametrize("damage", ["absent", "cut"])
def test_damage_is_one_line(checkpoint: Path, damage: str) -> None:
    target = checkpoint / "one.safetensors"
    if damage == "absent":
        target = checkpoint / "nowhere"
    else:
        target.write_bytes(target.read_bytes()[:-10])
    result = CliRunner().invoke(app, ["inspect", str(target)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert target.name in result.stderr
    assert "CheckpointError" in result.stderr
