"""Opening a participant's own copy of the model, and comparing it with the coordinator's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprllm.errors import ModelError
from fedprllm.federation.plan import SiteSettings
from fedprllm.federation.site.process import Failed
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fingerprints import first_difference, model_digest
from fedprllm.models.identity import describe_difference, model_identity, number_of
from fedprllm.models.source import is_hub_id, resolve_model

__all__ = ["earlier_result", "open_model", "open_own_dense"]


def earlier_result(out: Path, run: str) -> Path:
    """The model that an earlier run left at this participant.

    Args:
        out: Folder with the participant's results.
        run: Id of the run in hexadecimal digits.

    Raises:
        Failed: It is not there.
    """
    for mark in sorted(out.glob("*/.run-id")):
        if mark.read_text(encoding="utf-8") == run and (mark.parent / "model").is_dir():
            return mark.parent / "model"
    raise Failed(
        "model missing",
        message=f"the result of run {run}, which is to be healed, is not in {out}: fetch it with "
        "'fedprllm participate KIT --fetch NAME', and ask the coordinator to start the run again",
    )


def open_model(
    settings: SiteSettings,
    named: str,
    expected: Mapping[str, str],
    dtype: str,
    device: str,
    exclude: Sequence[str] = (),
    earlier: Path | None = None,
) -> BlockwiseModel:
    """Open the participant's copy of the coordinator's model.

    Args:
        settings: The participant's settings, which may name its copy.
        named: The coordinator's name for the model.
        expected: Identity of the coordinator's model.
        dtype: Precision of the forward pass.
        device: Device to compute on.
        exclude: Names and patterns of the Linears that stay dense.
        earlier: The copy, if it is the result of an earlier run.

    Raises:
        Failed: There is no copy, or it is not the same model.
    """
    source = str(earlier) if earlier is not None else _own_copy(settings, named)
    model = BlockwiseModel(_resolved(source), dtype, device, exclude)
    found = model_identity(model)
    different = first_difference(expected, found)
    if different is not None:
        raise Failed(
            "model differs",
            different,
            f"the model at {source} is not the coordinator's: "
            f"{describe_difference(different, expected, found)}; get the same copy as the coordinator's "
            "and name it with --model",
            number_of(different, found),
        )
    return model


def open_own_dense(
    settings: SiteSettings, named: str, digest: str, dtype: str, device: str
) -> BlockwiseModel:
    """Open the participant's copy of the dense model that healing compares with.

    Args:
        settings: The participant's settings, which may name its copy.
        named: The coordinator's name for it.
        digest: Digest of its weights, in hexadecimal digits.
        dtype: Precision of the forward pass.
        device: Device to compute on.

    Raises:
        Failed: There is no copy, or it is not the same model.
    """
    source = _own_copy(settings, named)
    dense = BlockwiseModel(_resolved(source), dtype, device)
    if model_digest(model_identity(dense)).hex() != digest:
        raise Failed(
            "model differs",
            message=f"the model at {source} is not the one that the coordinator's run pruned: get the same "
            "copy and name it with --model",
        )
    return dense


def _own_copy(settings: SiteSettings, named: str) -> str:
    """The participant's copy of a model, or its hub id."""
    if settings.model is None and not is_hub_id(named):
        # The coordinator must not choose which local files are opened.
        raise Failed(
            "model missing",
            message=f"the coordinator's model is at {named}, a path on its own machine: get the same "
            "model and name your copy with --model",
        )
    return settings.model or named


def _resolved(source: str) -> Path:
    try:
        return resolve_model(source)
    except ModelError as error:
        raise Failed("model missing", message=str(error)) from None
