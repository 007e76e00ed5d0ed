"""The paper's strategies as a table: whose decision a participant walks on with, and which models result.

| strategy | participants | walk on with | resulting model |
|---|---|---|---|
| one-shot | all, together | their own masks | the server's |
| iterative | all, together | the server's mask | the server's |
| centralized | one that holds all text | its own mask | its own |
| local-only | all, each alone | their own masks | one per participant |
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """How participants and the server share the work of a run.

    Attributes:
        pools_text: Whether a single participant stands for all and holds all of their windows.
        server_votes: Whether the updates are summed and the server's decision becomes the model; otherwise
            each participant's own decision becomes a separate model.
        follows_server: Whether participants compute the next block's input from the server's decision instead
            of their own, which takes one round of communication per block.
    """

    pools_text: bool = False
    server_votes: bool = True
    follows_server: bool = False


STRATEGIES: dict[str, Strategy] = {
    "one-shot": Strategy(),
    "iterative": Strategy(follows_server=True),
    "centralized": Strategy(pools_text=True, server_votes=False),
    "local-only": Strategy(server_votes=False),
}
