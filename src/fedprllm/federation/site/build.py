"""Building the pruned model from a participant's dense copy: a separate process, without network.

    python -m fedprllm.federation.site.build RESULT SETTINGS OUT

RESULT is the folder that `fedprllm.federation.site.results` fetched; OUT receives ``model/``. If the process
is killed, the next one continues: a block whose shard is already right is not built again.
"""

from __future__ import annotations

import shutil
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedprllm.errors import FedprllmError, RunError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.protocol.results import Manifest, Measured, read_manifest
from fedprllm.federation.site.process import Failed, end_with_parent, is_out_of_memory, limit_resources
from fedprllm.files import free_bytes, read_json, rename, write_json, write_text
from fedprllm.lean import start_lean
from fedprllm.process import use_large_pages

__all__ = ["MANIFEST", "OUTCOME", "main"]

MANIFEST = "manifest.json"
OUTCOME = "outcome.json"
# A participant's measurement need not cover all of a long text.
_MAX_HELD_OUT_TOKENS = 65_536
_DTYPE = "float32"


def main(arguments: list[str]) -> int:
    """Build the model, compare it with the coordinator's, and measure it if the settings say so.

    Args:
        arguments: Folder of the fetched result, settings file, folder for the model.

    Returns:
        Exit status: 0 if the model is there, 1 after a failure. ``RESULT/outcome.json`` says which.
    """
    result, settings_file, out = (Path(argument) for argument in arguments)
    settings = SiteSettings(**read_json(settings_file))
    end_with_parent()
    limit_resources(settings)
    try:
        outcome = _build(result, settings, out)
    except Failed as failure:
        outcome = {"outcome": failure.code, "message": str(failure)}
    except FedprllmError as error:
        outcome = {"outcome": "failed", "message": str(error)}
    except Exception as error:  # noqa: BLE001  the log gets the traceback, the participant a sentence
        traceback.print_exception(error)
        words = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
            words = "not enough memory: raise --memory-gb"
        outcome = {"outcome": "failed", "message": words}
    write_json(result / OUTCOME, outcome)
    return 0 if outcome["outcome"] == "received" else 1


def _build(result: Path, settings: SiteSettings, out: Path) -> dict[str, Any]:
    from fedprllm.federation.site.model import earlier_result, open_model

    manifest = read_manifest((result / MANIFEST).read_bytes())
    device = settings.device or "cpu"
    earlier = earlier_result(out.parent, manifest.of) if manifest.of else None
    model = open_model(
        settings, manifest.model, manifest.fingerprints, _DTYPE, device, manifest.exclude, earlier
    )
    if len(manifest.blocks) != (1 if manifest.healed else model.n_blocks):
        raise Failed(
            "result differs",
            message=f"the result has {len(manifest.blocks)} blocks and the model {model.n_blocks}",
        )
    finished = out / "model"
    if not finished.exists():
        unfinished = out / "model.unfinished"
        _check_space(out, model.checkpoint.n_bytes)
        _write(model, manifest, result, unfinished)
        _compare(manifest, model, unfinished)
        rename(unfinished, finished)
    found = {"outcome": "received", "message": "", "digest": manifest.digest}
    return found | _measured(settings, model.folder, finished)


def _check_space(out: Path, n_bytes: int) -> None:
    free = free_bytes(out)
    if free < n_bytes:
        raise RunError(
            f"the disk of {out} has {free / 1e9:.1f} GB free, and the model takes {n_bytes / 1e9:.1f} GB: "
            "free some space, or name another folder with --out"
        )


def _write(model: Any, manifest: Manifest, result: Path, unfinished: Path) -> None:
    """Write the model's shards, one block in memory at a time."""
    from fedprllm.federation.protocol.decision import decided_weights
    from fedprllm.models.checkpoint import CheckpointWriter
    from fedprllm.models.fewer_experts import write_fewer_experts
    from fedprllm.models.fingerprints import model_digest
    from fedprllm.models.shorter import write_shorter
    from fedprllm.models.smaller import write_rest

    if manifest.healed:
        _write_healed(model, manifest, result, unfinished)
        return
    if manifest.dropped:
        write_shorter(unfinished, model, manifest.dropped)
        write_text(unfinished / "README.md", manifest.card)
        return
    if manifest.removed_experts:
        write_fewer_experts(unfinished, model, manifest.removed_experts)
        write_text(unfinished / "README.md", manifest.card)
        return
    digest, run = model_digest(manifest.fingerprints), bytes.fromhex(manifest.run)
    writer = CheckpointWriter(unfinished, model.checkpoint, model.n_blocks)
    for index in range(model.n_blocks):
        if _is_right(writer.shard_path(index), model, index, manifest.tensors):
            continue
        message = (result / f"block-{index:04d}.decision").read_bytes()
        with model.block(index) as block:
            weights = decided_weights(message, block, run, digest)
            writer.write(index, weights.remaining(block.tensors))
    write_rest(writer, model)
    write_text(unfinished / "README.md", manifest.card)


def _write_healed(model: Any, manifest: Manifest, result: Path, unfinished: Path) -> None:
    """Fold the parameters into the model that was healed."""
    from fedprllm.federation.protocol.parameters import decode_parameters
    from fedprllm.healing.result import write_healed
    from fedprllm.models.fingerprints import model_digest
    from fedprllm.models.tunable import TunableParameters

    tunable = TunableParameters(model)
    message = (result / "block-0000.decision").read_bytes()
    digest, run = model_digest(manifest.fingerprints), bytes.fromhex(manifest.run)
    write_healed(unfinished, model, tunable, decode_parameters(message, tunable.n, 0, run, digest))
    write_text(unfinished / "README.md", manifest.card)


def _is_right(shard: Path, model: Any, block: int, expected: Mapping[str, str]) -> bool:
    """Whether a shard of an earlier process holds what belongs there."""
    from fedprllm.models.checkpoint import tensor_fingerprint

    if not shard.exists():
        return False
    try:
        tensors = model.checkpoint.load_from(shard, model.names_in_block(block))
        return all(tensor_fingerprint(name, each) == expected.get(name) for name, each in tensors.items())
    except FedprllmError:
        return False


def _compare(manifest: Manifest, model: Any, unfinished: Path) -> None:
    """Check that every tensor of the model is the coordinator's, whatever its name in the files.

    Raises:
        Failed: One differs. What was built is deleted.
    """
    from fedprllm.models.checkpoint import Checkpoint
    from fedprllm.models.skeleton import build_skeleton

    checkpoint = Checkpoint(unfinished, build_skeleton(unfinished, model.dtype))
    found = checkpoint.fingerprints(checkpoint.names)
    different = sorted(
        name for name in {*found, *manifest.tensors} if found.get(name) != manifest.tensors.get(name)
    )
    if different:
        shutil.rmtree(unfinished)
        raise Failed(
            "result differs",
            different[0],
            f"'{different[0]}' of the model built here is not the coordinator's (nor are "
            f"{len(different) - 1} other tensors): the model was deleted; fetch the result again with "
            "--fetch, and ask the coordinator if it differs again",
        )


def _measured(settings: SiteSettings, dense: Path, pruned: Path) -> dict[str, Any]:
    """Perplexities on the participant's held-out text, if it named one."""
    if not settings.held_out:
        return {}
    from fedprllm.evaluation.perplexity import evaluate

    device = settings.device or "cpu"
    found = {}
    for name, folder in (("dense", dense), ("pruned", pruned)):
        (perplexity,) = evaluate(
            folder, {"held out": settings.held_out}, max_tokens=_MAX_HELD_OUT_TOKENS, device=device
        )
        found[name] = Measured.of(perplexity).model_dump(mode="json")
    return found


if __name__ == "__main__":
    use_large_pages()
    start_lean()
    sys.exit(main(sys.argv[1:]))
