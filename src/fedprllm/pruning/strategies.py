"""The paper's strategies as a table: whose decision prunes a block during the walk, and for which model.

| strategy | participants | walks on with | models made |
|---|---|---|---|
| one-shot | all | its own mask | the server's |
| iterative | all | the server's mask | the server's |
| centralized | one, with all text | its own mask | its own |
| local-only | all, each alone | its own mask | one each |
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """How participants take part in a walk.

    Attributes:
        pools_text: One participant stands for all and holds all their windows.
        server_votes: The participants' masks are summed and the server's decision is the model;
            otherwise every participant's own decision is a model of its own.
        follows_server: Participants feed the next block from the server's decision, which takes one
            round of communication per block, not from their own.
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
