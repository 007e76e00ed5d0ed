"""The participant's dry run: what would be sent, and under masks what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from fedprllm.cli.console import console, need_keys, noting
from fedprllm.errors import ConfigError, RunError
from fedprllm.federation.plan import RunPlan, SiteSettings, read_run_plan

if TYPE_CHECKING:
    from fedprllm.federation.site.dry_run import TensorPreview

__all__ = ["show_dry_run"]


def show_dry_run(settings: SiteSettings, kit: Path, config: Path | None, blocks: int) -> None:
    """Compute the updates of the first blocks and show them, without connecting.

    Args:
        settings: The participant's own settings.
        kit: Its folder.
        config: The run's TOML file.
        blocks: Number of blocks.

    Raises:
        ConfigError: No model is named, or the run would be refused.
        RunError: There is not enough memory.
    """
    from fedprllm.federation.site.dry_run import dry_run
    from fedprllm.federation.site.process import is_out_of_memory, lift_memory_limit, limit_resources

    if config is None and settings.model is None:
        raise ConfigError("no model: name the run's TOML file with --config, or a model with --model")
    plan = read_run_plan(config) if config else RunPlan(name="dry-run", model=settings.model or "")
    settings = settings.model_copy(update={"out": settings.out or str(kit / "runs")})
    total = n_blocks = shown = 0
    step = "block"
    limit_resources(settings)
    try:
        with noting():
            n_participants = _n_participants(kit, plan)
            previews = list(dry_run(settings, plan, kit.name or "participant", blocks, n_participants))
    except (MemoryError, RuntimeError) as error:
        lift_memory_limit()
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"not enough memory ({str(error) or 'MemoryError'}): raise --memory-gb, or keep hidden states in "
            "files with --memory-limit"
        ) from None
    for preview in previews:
        total, n_blocks = total + preview.message_bytes, preview.n_blocks
        shown, step = shown + 1, preview.step
        if preview.hidden:
            _show_tensors(
                f"{step} {preview.block}: what is hidden, and stays on this machine",
                preview.hidden,
                "# prune, . keep",
            )
            title = f"{step} {preview.block}: {preview.kind}, as sent; room for {n_participants} participants"
            _show_tensors(title, preview.tensors, "in hexadecimal; another mask in every run")
        else:
            title = f"{step} {preview.block}: {preview.kind}, computed from {preview.n_tokens:,} tokens"
            _show_tensors(title, preview.tensors, "# prune, . keep")
        console.print(f"message  {preview.message_bytes:,} bytes; nothing was sent")
    console.print(f"all {n_blocks} {step}s: about {total * n_blocks // max(shown, 1):,} bytes")


def _n_participants(kit: Path, plan: RunPlan) -> int:
    """Participants of the run: those of the plan, of the pinned roster, or the fewest there can be."""
    from fedprllm.errors import SecureError

    if plan.participants or not plan.config.secure:
        return max(3, len(plan.participants))
    need_keys()
    from fedprllm.federation.site.masking import pinned_roster

    try:
        return max(3, len(pinned_roster(kit / "local").keys))
    except SecureError:
        return 3


def _show_tensors(title: str, tensors: Sequence[TensorPreview], meaning: str) -> None:
    table = Table("tensor", "shape", "type", "bytes", title=title)
    for tensor in tensors:
        table.add_row(
            escape(tensor.name),
            " x ".join(map(str, tensor.shape)),
            tensor.dtype,
            f"{tensor.payload_bytes:,}",
        )
    console.print(table)
    console.print(f"first rows of {escape(tensors[0].name)} ({meaning}):")
    for row in tensors[0].rows:
        console.print(f"  {escape(row)}", highlight=False)
