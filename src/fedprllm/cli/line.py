"""What a long command is doing: a line that is replaced on a terminal, and one line per change elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.live import Live
from rich.text import Text

from fedprllm.cli.console import errors

__all__ = ["StatusLine"]


class StatusLine:
    """The last line of a command's output; use it as a context manager."""

    def __init__(self) -> None:
        self._last = ""
        self._live = Live(console=errors, refresh_per_second=4, transient=True)

    def __enter__(self) -> StatusLine:
        if errors.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def show(self, words: str, passing: str = "") -> None:
        """Show a state.

        Args:
            words: The state. Without a terminal, it is printed when it differs from the last one.
            passing: What changes all the time, such as a count; shown on a terminal only.
        """
        if errors.is_terminal:
            self._live.update(Text(f"{words}{passing}"))
        elif words != self._last:
            errors.print(Text(words), soft_wrap=True)
        self._last = words

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to a question."""
        if not errors.is_terminal:
            yield
            return
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()
