"""Whatever model the user gives, the result is a readable folder or an explanation."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Llama4TextConfig

from fedprllm.errors import ModelError, RunError
from fedprllm.models import conversion, source
from fedprllm.models.skeleton import build_skeleton
from fedprllm.models.source import resolve_model
from tests.models import ARCHITECTURES

_SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEDPRLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def fail(*_: object) -> None:
            raise AssertionError("converted although it was not needed")

        monkeypatch.setattr(source, "convert_folder", fail)
        monkeypatch.setattr(source, "convert_gguf", fail)

    return forbid


def _as_pickle(folder: Path, copy: Path) -> Path:
    """A copy of a model folder with its weights in pytorch_model.bin, like old checkpoints."""
    shutil.copytree(folder, copy)
    (copy / "model.safetensors").unlink()
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), copy / "pytorch_model.bin")
    return copy


def _assert_same_model(found: Path, expected: torch.nn.Module) -> None:
    """Assert that the folder contains exactly the model's tensors, named as in its state dict."""
    tensors = {}
    for file in found.glob("*.safetensors"):
        tensors |= load_file(file)
    own = {name for name, _ in (*expected.named_parameters(), *expected.named_buffers())}
    state = {name: value for name, value in expected.state_dict().items() if name in own}
    assert tensors.keys() == state.keys()
    for name, value in state.items():
        assert tensors[name].dtype == value.dtype
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0)


# --- A folder that can be read as it is ---


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_a_folder_that_fits_is_used_in_place(name, tiny, cache, no_conversion) -> None:
    no_conversion()
    assert resolve_model(tiny(name)) == tiny(name)
    assert resolve_model(str(tiny(name))) == tiny(name)
    assert not cache.exists()


def test_a_checkpoint_in_parts_is_used_in_place(tiny, cache, tmp_path, no_conversion) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    no_conversion()
    assert resolve_model(tmp_path / "parts") == tmp_path / "parts"


def test_names_may_lack_the_prefix_of_the_base_model(tiny, cache, tmp_path, no_conversion) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("gpt2"))
    model.transformer.save_pretrained(tmp_path / "base")
    with safe_open(tmp_path / "base" / "model.safetensors", "pt") as tensors:
        assert "h.0.ln_1.weight" in set(tensors.keys())
    no_conversion()
    assert resolve_model(tmp_path / "base") == tmp_path / "base"


def test_weights_are_not_loaded_to_compare_names(tiny) -> None:
    skeleton = build_skeleton(tiny("llama"))
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}


# --- A folder that transformers has to read ---


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_pickled_weights_are_converted_once(name, tiny, cache, tmp_path, no_conversion) -> None:
    folder = _as_pickle(tiny(name), tmp_path / "old")
    (folder / "tokenizer.json").write_text("{}")
    found = resolve_model(folder)
    assert found.parent == cache
    assert found.name.startswith("old-")
    _assert_same_model(found, AutoModelForCausalLM.from_pretrained(tiny(name)))
    _assert_same_model(found, AutoModelForCausalLM.from_pretrained(found))
    assert (found / "tokenizer.json").read_text() == "{}"
    no_conversion()
    assert resolve_model(folder) == found
    assert resolve_model(found) == found


def test_pickled_weights_in_parts_are_converted(tiny, cache, tmp_path) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    weights = torch.load(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").unlink()
    part_of = {name: f"pytorch_model-{1 + index % 2}.bin" for index, name in enumerate(weights)}
    for part in set(part_of.values()):
        torch.save({name: weights[name] for name in weights if part_of[name] == part}, folder / part)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": part_of}))
    found = resolve_model(folder)
    _assert_same_model(found, AutoModelForCausalLM.from_pretrained(tiny("llama")))
    assert not (found / index.name).exists()


def test_converted_weights_are_as_readable_as_the_configuration(tiny, cache, tmp_path) -> None:
    found = resolve_model(_as_pickle(tiny("llama"), tmp_path / "old"))
    assert (found / "model.safetensors").stat().st_mode == (found / "config.json").stat().st_mode


def test_precision_of_the_file_is_kept(tiny, cache, tmp_path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny("llama")).bfloat16().save_pretrained(tmp_path / "half")
    found = resolve_model(_as_pickle(tmp_path / "half", tmp_path / "old"))
    with safe_open(found / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_unmarked_fused_experts_are_refused_before_a_conversion(cache, tmp_path) -> None:
    config = Llama4TextConfig(**_SMALL, intermediate_size=32, intermediate_size_mlp=32, num_local_experts=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"experts\.\w+' of Llama4ForCausalLM .*use another model"):
        resolve_model(tmp_path / "model")
    assert not cache.exists()


def test_another_source_is_another_conversion(tiny, cache, tmp_path) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    first = resolve_model(folder)
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save({name: value + 1 for name, value in weights.items()}, folder / "pytorch_model.bin")
    second = resolve_model(folder)
    assert second != first
    (folder / "tokenizer_config.json").write_text("{}")
    assert resolve_model(folder) not in (first, second)


def test_cache_dir_overrides_the_environment(tiny, cache, tmp_path) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    assert resolve_model(folder, cache_dir=tmp_path / "mine").parent == tmp_path / "mine" / "models"
    assert not cache.exists()


# --- The hub ---


def _fake_hub(monkeypatch, remote: Path, snapshot: Path) -> list[list[str]]:
    """Replace the hub by one with a single model; return the requests made to it."""
    asked: list[list[str]] = []

    def snapshot_download(model, *, allow_patterns, ignore_patterns) -> str:
        assert model == "some-org/some-model"
        asked.append(allow_patterns)
        snapshot.mkdir(exist_ok=True)
        files = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(
            files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (snapshot / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(remote / name, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_hub_id_downloads_only_what_is_needed(tiny, cache, tmp_path, monkeypatch) -> None:
    remote = tmp_path / "remote"
    shutil.copytree(tiny("llama"), remote)
    for name in ("pytorch_model.bin", "consolidated.safetensors", "tf_model.h5", "merges.txt", "README.md"):
        (remote / name).write_bytes(b"")
    (remote / "original").mkdir()
    (remote / "original" / "model.safetensors").write_bytes(b"")
    (remote / "original" / "params.json").write_bytes(b"")
    asked = _fake_hub(monkeypatch, remote, tmp_path / "snapshot")
    found = resolve_model("some-org/some-model")
    assert found == tmp_path / "snapshot"
    assert {path.name for path in found.iterdir()} == {
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
    }
    assert len(asked) == 1


def test_hub_model_without_safetensors_is_downloaded_pickled(tiny, cache, tmp_path, monkeypatch) -> None:
    remote = _as_pickle(tiny("llama"), tmp_path / "remote")
    asked = _fake_hub(monkeypatch, remote, tmp_path / "snapshot")
    found = resolve_model("some-org/some-model")
    assert len(asked) == 2
    _assert_same_model(found, AutoModelForCausalLM.from_pretrained(tiny("llama")))


def test_hub_out_of_reach_is_reported(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"some-org/some-model.*Offline\? Give a local folder or a GGUF"):
        resolve_model("some-org/some-model")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub_errors.RepositoryNotFoundError, "or on the hub: check its name"),
        (hub_errors.GatedRepoError, "accept its terms"),
        (hub_errors.HTTPError, "Offline"),
        (ConnectionResetError, "ConnectionResetError: by the test"),
    ],
)
def test_errors_of_the_hub_are_told_apart(kind, words, cache, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object, **__: object) -> None:
        error = kind.__new__(kind)
        Exception.__init__(error, "by the test")
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError, match=words):
        resolve_model("gpt3")


def test_a_single_name_may_be_a_misspelled_folder(tiny, cache, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "my-llama")
    (tmp_path / "notes").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"did you mean 'my-llama'\? Available: my-llama\."):
        resolve_model("my-lama")


# --- What cannot be used ---


def test_a_missing_path_names_its_neighbors(tiny, cache, tmp_path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "llama-small")
    (tmp_path / "other.gguf").write_bytes(b"")
    (tmp_path / "text.jsonl").write_bytes(b"")
    with pytest.raises(ModelError, match=r"mean 'llama-small'\? Available: llama-small, other\.gguf\."):
        resolve_model(tmp_path / "llama-smal")
    with pytest.raises(ModelError, match=r"did you mean 'other\.gguf'"):
        resolve_model(str(tmp_path / "othr.gguf"))
    with pytest.raises(ModelError, match="nowhere does not exist either"):
        resolve_model(tmp_path / "nowhere" / "model")


def test_owner_of_a_hub_id_may_be_a_folder_here(tiny, cache, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "models" / "llama")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no model at models/lama: 'lama'; did you mean 'llama'"):
        resolve_model("models/lama")


def test_folders_without_a_model_are_explained(tiny, cache, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json$"):
        resolve_model(folder)
    (folder / "a.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"to use a GGUF file, give the file itself: a\.gguf"):
        resolve_model(folder)
    shutil.copyfile(tiny("llama") / "config.json", folder / "config.json")
    with pytest.raises(ModelError, match=r"no weights: expected model\.safetensors.*found a\.gguf, config"):
        resolve_model(folder)
    with pytest.raises(ModelError, match="is a file, but not a GGUF file"):
        resolve_model(folder / "config.json")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "t5"}, r"encoder-decoder model \(t5\)"),
        ({"model_type": "bart"}, r"encoder-decoder model \(bart\)"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"an encoder model \(bert\)"),
        ({"model_type": "vit"}, r"\(vit\) is not a decoder-only language model"),
        ({"model_type": "never-heard-of"}, "config.json cannot be read"),
        ({"model_type": "llama", "hidden_size": "many"}, "config.json cannot be read"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "quantized"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "a.B"}}, "config.json cannot be read"),
    ],
)
def test_configurations_that_cannot_be_pruned_are_explained(config, words, cache, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=words):
        resolve_model(tmp_path)


def test_a_configuration_that_is_not_json_is_reported(cache, tmp_path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json cannot be read"):
        resolve_model(tmp_path)


def test_corrupted_weights_are_reported(tiny, cache, tmp_path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"model\.safetensors is corrupted"):
        resolve_model(tmp_path / "cut")
    pickled = _as_pickle(tiny("llama"), tmp_path / "old")
    whole = (pickled / "pytorch_model.bin").read_bytes()
    (pickled / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot be read: .*It is corrupted"):
        resolve_model(pickled)


def test_incomplete_weights_are_reported(tiny, cache, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    part = sorted((tmp_path / "parts").glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(ModelError, match=f"{part.name} missing"):
        resolve_model(tmp_path / "parts")
    (tmp_path / "parts" / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not a valid index of weights"):
        resolve_model(tmp_path / "parts")

    shutil.copytree(tiny("llama"), tmp_path / "less")
    tensors = load_file(tmp_path / "less" / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"incomplete.*layers\.1\.mlp\.up_proj\.weight missing"):
        resolve_model(tmp_path / "less")


def test_weights_of_another_shape_are_reported(tiny, cache, tmp_path) -> None:
    shutil.copytree(tiny("llama"), tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    with pytest.raises(ModelError, match=r"the weights do not fit config\.json"):
        resolve_model(tmp_path / "other")


def test_a_cache_that_cannot_be_written_is_reported(tiny, tmp_path, monkeypatch) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RunError, match="set FEDPRLLM_CACHE to another folder"):
        resolve_model(folder, cache_dir=tmp_path / "file")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(huggingface_hub, "save_torch_state_dict", full)
    with pytest.raises(RunError, match="No space left on device"):
        resolve_model(folder, cache_dir=tmp_path / "cache")
    assert [entry.name for entry in (tmp_path / "cache" / "models").iterdir()] == ["convert.lock"]


# --- Nothing half written, nothing twice ---


def test_a_killed_conversion_leaves_no_entry_and_is_cleared_away(tiny, tmp_path) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    program = f"""
        import os, signal
        from pathlib import Path
        from fedprllm.models.conversion import converted
        from fedprllm.models.side_files import side_files
        from fedprllm.progress import silent
        def convert(source, folder):
            (folder / "model.safetensors").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        folder = Path({str(folder)!r})
        files = [folder / "pytorch_model.bin", *(folder / name for name in side_files(folder))]
        converted(folder, files, convert, Path({str(tmp_path / "cache")!r}), silent)
    """
    search = os.pathsep.join([str(Path(source.__file__).parents[2]), *sys.path])
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": search},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    left = [entry.name for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]
    assert len(left) == 1
    assert left[0].endswith(".partial")

    found = resolve_model(folder, cache_dir=tmp_path / "cache")
    assert left == [f"{found.name}.partial"]
    _assert_same_model(found, AutoModelForCausalLM.from_pretrained(tiny("llama")))
    assert [entry for entry in found.parent.iterdir() if entry.is_dir()] == [found]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ModelError])
def test_an_interrupted_conversion_leaves_nothing(interruption, tiny, cache, tmp_path, monkeypatch) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")

    def interrupted(state, folder, second_names) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise interruption

    monkeypatch.setattr(conversion, "_save", interrupted)
    with pytest.raises(interruption):
        resolve_model(folder)
    assert [entry.name for entry in cache.iterdir()] == ["convert.lock"]


def test_two_processes_do_not_convert_at_once(tiny, cache, tmp_path, monkeypatch) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    held = []

    def convert(source_folder, target) -> None:
        with pytest.raises(Timeout), FileLock(cache / "convert.lock", timeout=0):
            pass
        held.append(target)

    monkeypatch.setattr(source, "convert_folder", convert)
    resolve_model(folder)
    assert len(held) == 1
    with FileLock(cache / "convert.lock", timeout=0):
        pass


def test_what_another_process_converted_meanwhile_is_used(tiny, cache, tmp_path, monkeypatch) -> None:
    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    found = resolve_model(folder)
    hidden = found.rename(tmp_path / "hidden")
    acquire = FileLock.__enter__

    def acquire_after_the_other(lock) -> FileLock:
        entered = acquire(lock)
        hidden.rename(found)
        return entered

    def fail(*_: object) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(FileLock, "__enter__", acquire_after_the_other)
    monkeypatch.setattr(source, "convert_folder", fail)
    assert resolve_model(folder) == found


# --- Silence ---


@pytest.fixture
def talkative() -> Iterator[list[logging.LogRecord]]:
    """The messages that the libraries log while logging is enabled."""
    records: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = records.append
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO)
        logger.addHandler(listener)
    transformers.logging.enable_progress_bar()
    yield records
    transformers.logging.disable_progress_bar()
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
        logger.removeHandler(listener)


def test_nothing_is_printed_and_no_setting_changed(tiny, cache, tmp_path, capfd, talkative) -> None:
    folder = _as_pickle(tiny("gpt2"), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": 999}))
    AutoModelForCausalLM.from_pretrained(folder)
    assert talkative
    assert capfd.readouterr().err
    talkative.clear()
    before = list(warnings.filters), sys.stderr
    resolve_model(folder)
    with pytest.raises(ModelError):
        resolve_model(tiny("llama") / "missing")
    assert capfd.readouterr() == ("", "")
    assert not talkative
    assert before == (list(warnings.filters), sys.stderr)
    for library in (transformers, huggingface_hub):
        assert library.logging.get_verbosity() == logging.INFO
    assert transformers.logging.is_progress_bar_enabled()


def test_progress_reports_only_conversions(tiny, cache, tmp_path) -> None:
    told = []

    @contextmanager
    def progress(description, total):
        told.append((description, total))
        yield lambda steps: told.append(steps)

    folder = _as_pickle(tiny("llama"), tmp_path / "old")
    resolve_model(folder, progress=progress)
    assert told == [("converting old", 1), 1]
    resolve_model(folder, progress=progress)
    resolve_model(tiny("llama"), progress=progress)
    assert len(told) == 2
