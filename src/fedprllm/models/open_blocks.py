"""The blocks of a model, open one at a time or, if they may stay, all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from fedprllm.models.block import Block
from fedprllm.models.blockwise import BlockwiseModel

__all__ = ["OpenBlocks"]


class OpenBlocks:
    """The blocks of a model, one at a time in memory or, if they may stay, all.

    Args:
        model: The model.
        stay: Whether blocks stay in memory until the ``with`` block ends.
    """

    def __init__(self, model: BlockwiseModel, *, stay: bool) -> None:
        self._model, self._stay = model, stay
        self._stack = ExitStack()
        self._open: dict[int, Block] = {}

    def __enter__(self) -> OpenBlocks:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.clear()
        self._stack.close()

    @contextmanager
    def at(self, index: int) -> Iterator[Block]:
        """Have a block in memory inside the ``with`` block."""
        with ExitStack() as stack:
            if index not in self._open:
                keeper = self._stack if self._stay else stack
                block = keeper.enter_context(self._model.block(index))
                if not self._stay:
                    yield block
                    return
                self._open[index] = block
            yield self._open[index]
