"""Which files make a model, and which ones are refused before anything is loaded."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from harp_batch.errors import ModelError
from harp_batch.models.checks import check_directory
from harp_batch.models.weights import count_parameters, sha256_of_file, sha256_of_files, weight_files

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARP_BATCH_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


def write(folder: Path, config: dict[str, Any], name: str = "config.json") -> Path:
    (folder / name).write_text(json.dumps(config))
    return folder


def sharded(folder: Path) -> Path:
    """Two shards and their index, with a stray file of the same weights beside them."""
    save_file({"a": torch.zeros(3, 4), "b": torch.zeros(5)}, folder / "model-1.safetensors")
    save_file({"c": torch.zeros(2, 2, 2)}, folder / "model-2.safetensors")
    save_file({"a": torch.zeros(3, 4)}, folder / "consolidated.safetensors")
    shards = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    return write(folder, {"weight_map": shards}, "model.safetensors.index.json")


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    files = weight_files(sharded(tmp_path))
    assert [file.name for file in files] == ["model-1.safetensors", "model-2.safetensors"]
    assert count_parameters(files) == 12 + 5 + 8


def test_a_single_file_goes_before_an_index_as_it_does_for_transformers(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 4)}, sharded(tmp_path) / "model.safetensors")
    assert [file.name for file in weight_files(tmp_path)] == ["model.safetensors"]


def test_missing_shard_is_named(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model-2\.safetensors"):
        weight_files(tmp_path)


def test_index_cannot_point_outside(tmp_path: Path) -> None:
    write(tmp_path, {"weight_map": {"a": "../secret.safetensors"}}, "model.safetensors.index.json")
    with pytest.raises(ModelError, match="outside of the directory"):
        weight_files(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pickled weights only \(pytorch_model\.bin\)"):
        weight_files(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x05\x00", b"\xff" * 16, b"\x02\x00\x00\x00\x00\x00\x00\x00[]"])
def test_damaged_safetensors_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not a safetensors file"):
        count_parameters([tmp_path / "model.safetensors"])


def test_hash_depends_on_every_file(tmp_path: Path) -> None:
    files = weight_files(sharded(tmp_path))
    before = sha256_of_files(files)
    assert sha256_of_files(files[::-1]) == before
    save_file({"c": torch.ones(2, 2, 2)}, files[1])
    assert sha256_of_files(files) != before


def test_hash_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    stat = file.stat()
    first = sha256_of_file(file)
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert sha256_of_file(file) == first, "same size and time: it should not have been read again"
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert sha256_of_file(file) != first


def test_hash_needs_no_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").write_bytes(b"one")
    expected = sha256_of_file(tmp_path / "weights")
    monkeypatch.setenv("HARP_BATCH_CACHE_DIR", str(tmp_path / "weights"))  # a file: nothing fits below it
    assert sha256_of_file(tmp_path / "weights") == expected


def test_causal_model_passes(tmp_path: Path) -> None:
    check_directory(write(tmp_path, LLAMA))


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "code.Model"}}, "config.json has auto_map"),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "is an encoder-decoder model (T5ForConditionalGeneration)",
        ),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "is not a causal language model (BertForMaskedLM)",
        ),
        ({"model_type": "new-thing"}, "transformers has no causal language model 'new-thing'"),
    ],
)
def test_unfit_config_is_refused_by_name(tmp_path: Path, config: dict[str, Any], part: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_directory(write(tmp_path, config))
    assert part in str(caught.value)


def test_code_in_the_tokenizer_is_refused(tmp_path: Path) -> None:
    write(tmp_path, LLAMA)
    write(tmp_path, {"auto_map": {"AutoTokenizer": ["code.Tok", None]}}, "tokenizer_config.json")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json has auto_map"):
        check_directory(tmp_path)


@pytest.mark.parametrize(("text", "part"), [("{", "cannot be read as JSON"), ("[]", "is not a JSON object")])
def test_damaged_config_is_refused(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=part):
        check_directory(tmp_path)


def test_missing_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_directory(tmp_path)
