"""The strategies of the paper, as a table: who decides what a block loses while walking, and for whom.

| strategy | participants | walks on with | models made |
|---|---|---|---|
| one-shot | everyone | its own mask | the server's |
| iterative | everyone | the server's mask | the server's |
| centralized | one, who holds all text | its own mask | its own |
| local-only | everyone, alone | its own mask | one each |
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["STRATEGIES", "Strategy"]


@dataclass(frozen=True)
class Strategy:
    """How a walk is shared out.

    Attributes:
        pools_text: one participant stands for all and holds all their windows.
        server_votes: the participants' masks are summed and the server's decision is the model;
            otherwise every participant's own decision is a model of its own.
        follows_server: participants feed the next block from the server's decision, which takes one
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
