"""A coordinator that asks for what it must not have, between the steps of a run.

Runs in the job process of a real server. It conspires with ``west``, whose signing key it holds. Every
forbidden question is asked over the network, and what came back is a line of ``answers.jsonl``. A participant
that has refused is simply asked to begin again, as any server could.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprllm.federation.coordinator.masks import Masks
from fedprllm.federation.coordinator.rounds import Coordinator
from fedprllm.federation.protocol.masks import (
    Agreement,
    Opening,
    read_bytes_by_name,
    read_shares,
    write_bytes_by_name,
)
from fedprllm.federation.protocol.messages import Request
from fedprllm.federation.site.masking import signing_key
from fedprllm.secure import keys
from fedprllm.secure.advert import Advert
from fedprllm.secure.participant import statement

HOSTILE_RUN = "hostile"
HONEST, CONSPIRATOR = ["east", "north", "south"], "west"
NAMES = [*HONEST, CONSPIRATOR]
N_BLOCKS = 5


def take_over(orders: Path) -> None:
    """Change what the coordinator of this process does.

    Args:
        orders: Folder for answers. A file ``pause OP`` in it stops every run where the step begins.
    """
    exchange, unmask, gather = Coordinator._exchange_keys, Coordinator._unmask, Coordinator._gather

    def is_hostile(self: Coordinator) -> bool:
        return self.plan.name == HOSTILE_RUN

    def exchange_keys(self: Coordinator, masks: Masks) -> None:
        if is_hostile(self):
            _Attack(self, masks, orders).before_keys()
        exchange(self, masks)
        if is_hostile(self):
            _Attack(self, masks, orders).after_boxes()

    def gathered(self: Coordinator, op: Any, payloads: Any, least: int | None = None) -> dict[str, bytes]:
        masks = self.ballots.masks
        if is_hostile(self) and masks is not None and op in ("shares", "boxes"):
            _Attack(self, masks, orders).before(op, payloads)
        _pause(orders, op)
        return gather(self, op, payloads, least)

    def unmasked(self: Coordinator, blocks: Any) -> None:
        masks = self.ballots.masks
        if is_hostile(self) and masks is not None:
            _Attack(self, masks, orders).two_lists()
        else:
            unmask(self, blocks)

    Coordinator._exchange_keys = exchange_keys  # type: ignore[method-assign]
    Coordinator._gather = gathered  # type: ignore[method-assign]
    Coordinator._unmask = unmasked  # type: ignore[method-assign]


def _pause(orders: Path, op: str) -> None:
    """Wait where a step begins, as long as the test wants."""
    order = orders / f"pause {op}"
    while order.exists():
        (orders / f"paused {op}").touch()
        time.sleep(0.05)


class _Attack:
    """Forbidden questions to the participants of one run."""

    def __init__(self, coordinator: Coordinator, masks: Masks, orders: Path) -> None:
        self._coordinator, self._masks, self._orders = coordinator, masks, orders
        self._ask_for, self._run = coordinator._ask_for, coordinator._run_id
        self._fingerprints = json.dumps(dict(self._ask_for.fingerprints)).encode()

    # ---- asking ------------------------------------------------------------------------------------------

    def _ask(self, name: str, op: Any, payload: bytes = b"", *, run: str = "", block: int = 0) -> Any:
        request = Request(op=op, run=run or self._run, block=block)
        reply, content = self._coordinator._ask([name], request, payload, 30.0)[name]
        return reply, bytes(content)

    def _start(self, name: str, *, run: str = "", config: Mapping[str, Any] = {}, names: Any = NAMES) -> Any:
        request = Request(
            op="start",
            run=run or self._run,
            model=self._coordinator.plan.model,
            config={**self._ask_for.config.model_dump(mode="json"), **config},
            blocks=list(range(N_BLOCKS)),
            participants=sorted(names),
        )
        return self._coordinator._ask([name], request, self._fingerprints, 30.0)[name][0]

    def _forbidden(
        self, what: str, name: str, op: Any, payload: bytes, *, run: str = "", block: int = 0
    ) -> None:
        """Ask, and write down what came back."""
        reply, content = self._ask(name, op, payload, run=run, block=block)
        self._note(what, name, state=reply.state, code=reply.code, n_bytes=len(content))

    def _note(self, what: str, name: str, **found: Any) -> None:
        with (self._orders / "answers.jsonl").open("a") as lines:
            lines.write(json.dumps({"what": what, "name": name, **found}) + "\n")

    # ---- keys --------------------------------------------------------------------------------------------

    def before_keys(self) -> None:
        self._downgrade()
        for what, names in (
            ("a minted participant", [*NAMES, "eve"]),
            ("two participants", ["north", "south"]),
        ):
            run = secrets.token_hex(16)
            self._start("north", run=run, names=names)
            self._forbidden(what, "north", "keys", _opening(names), run=run)
        lone = _opening(NAMES, {0: ["north"]})
        self._start("north")
        self._forbidden("a lone contributor", "north", "keys", lone)
        self._different({"west": {"config": {"sparsity": 0.6}}}, "another configuration for one")
        self._different({"west": {"names": ["north", "south", "west"]}}, "other participants for one")
        for name in NAMES:
            self._start(name)

    def _downgrade(self) -> None:
        run = secrets.token_hex(16)
        self._start("north", run=run, config={"secure": False})
        while (reply := self._ask("north", "state", run=run)[0]).state == "working":
            time.sleep(0.1)
        self._note("an update in the clear", "north", state=reply.state, code=reply.code, n_bytes=0)
        reply, content = self._ask("north", "fetch", run=run)
        self._note("fetched in the clear", "north", state=reply.state, code=reply.code, n_bytes=len(content))

    def _different(self, of: Mapping[str, Mapping[str, Any]], what: str) -> None:
        """Ask one participant for another run than the others, in one session."""
        run, session = secrets.token_hex(16), secrets.token_hex(16)
        adverts = {}
        for name in NAMES:
            options = of.get(name, {})
            self._start(name, run=run, **options)
            opening = _opening(options.get("names", NAMES), session=session)
            adverts[name] = self._ask(name, "keys", opening, run=run)[1]
        (self._orders / "adverts of another session.json").write_bytes(write_bytes_by_name(adverts))
        for name in HONEST:
            self._forbidden(what, name, "shares", write_bytes_by_name(adverts), run=run)

    # ---- shares and boxes --------------------------------------------------------------------------------

    def before(self, op: str, payloads: Mapping[str, bytes]) -> None:
        for what, change in {"shares": self._bad_adverts(), "boxes": BAD_BOXES}[op].items():
            changed = change(read_bytes_by_name(payloads["north"]))
            self._forbidden(what, "north", op, write_bytes_by_name(changed))
        self._start("north")

    def _bad_adverts(self) -> dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]]:
        earlier = read_bytes_by_name((self._orders / "adverts of another session.json").read_bytes())

        def replaced(adverts: dict[str, bytes]) -> dict[str, bytes]:
            body = adverts["south"][64:]
            return {**adverts, "south": keys.sign(Ed25519PrivateKey.generate(), b"advert", body) + body}

        return {
            "a replaced key": replaced,
            "keys of an earlier session": lambda adverts: {**adverts, "east": earlier["east"]},
            "keys of a few": lambda adverts: {name: adverts[name] for name in ("north", "south")},
        }

    def after_boxes(self) -> None:
        self._forbidden("a second session", "north", "keys", _opening(NAMES))
        self._forbidden("shares before agreement", "north", "unmask", _agreement(NAMES).pack())
        self._start("north")

    # ---- agreement ---------------------------------------------------------------------------------------

    def two_lists(self) -> None:
        """Tell two lists of survivors, with a conspirator that signs both; only one can ever be opened."""
        masks, less = self._masks, [name for name in NAMES if name != "east"]
        for what, names in (("a sum of two", ["north", "south"]), ("a stranger in the sum", [*NAMES, "eve"])):
            self._forbidden(what, "north", "agree", _agreement(names).pack())
        for block in range(N_BLOCKS):
            self._same_again("north", block)
        full, other = masks.agree_on(dict.fromkeys(range(N_BLOCKS), NAMES)), _agreement(less)
        first = {name: self._ask(name, "agree", full.pack())[1] for name in ("east", "north", CONSPIRATOR)}
        second = {"south": self._ask("south", "agree", other.pack())[1]}
        second[CONSPIRATOR] = self._conspirator_signs(other)
        self._forbidden("a second list", "north", "agree", other.pack())
        self._forbidden("the second list with too few signatures", "south", "unmask", _signed(other, second))
        self._forbidden(
            "the second list with signatures on the first", "south", "unmask", _signed(other, first)
        )
        self._forbidden("the first list, which it has not signed", "south", "unmask", _signed(full, first))
        self._forbidden("both kinds of share", "north", "unmask", _signed(other, {**second, **first}))
        few = {name: first[name] for name in ("east", "west")}
        self._forbidden("fewer signatures than the threshold", "north", "unmask", _signed(full, few))
        self._forbidden(
            "a forged signature", "north", "unmask", _signed(full, {**few, "north": first["north"][::-1]})
        )
        answers = {
            name: self._ask(name, "unmask", _signed(full, first))[1] for name in ("east", "north", "west")
        }
        again = self._ask("north", "unmask", _signed(full, first))[1]
        self._note("shares again", "north", same=again == answers["north"], n_bytes=len(again))
        masks.keep_shares(
            list(range(N_BLOCKS)), {name: read_shares(answer) for name, answer in answers.items()}
        )

    def _same_again(self, name: str, block: int) -> None:
        """Call an update invalid, twice, and fetch it again."""
        found = []
        for _ in range(3):
            content = self._ask(name, "fetch", block=block)[1]
            found.append(content)
            self._ask(name, "refused", block=block)
        self._note("fetched again", name, same=len(set(found)) == 1, n_bytes=len(found[0]))

    def _conspirator_signs(self, agreement: Agreement) -> bytes:
        adverts = read_bytes_by_name(self._masks.adverts())
        said = statement(
            bytes.fromhex(self._masks.opening.session),
            Advert.read(adverts[CONSPIRATOR]).context,
            keys.digest(*(adverts[name] for name in sorted(adverts))),
            self._masks.members,
            agreement.by_sum,
            keys.digest(),
        )
        kits = self._orders.parent / "kits"
        return keys.sign(signing_key(kits / CONSPIRATOR / "local"), b"agree", said)


def _opening(names: Any, changes: Mapping[int, list[str]] = {}, session: str = "") -> bytes:
    contributors = {block: list(names) for block in range(N_BLOCKS)} | dict(changes)
    return Opening(session=session or secrets.token_hex(16), contributors=contributors).pack()


def _agreement(names: Any) -> Agreement:
    return Agreement(survivors={block: sorted(names) for block in range(N_BLOCKS)})


def _signed(agreement: Agreement, signatures: Mapping[str, bytes]) -> bytes:
    return agreement.model_copy(update={"signatures": {n: s.hex() for n, s in signatures.items()}}).pack()


def _altered(boxes: dict[str, bytes]) -> dict[str, bytes]:
    return {**boxes, "south": boxes["south"][:-1] + bytes([boxes["south"][-1] ^ 1])}


BAD_BOXES: dict[str, Callable[[dict[str, bytes]], dict[str, bytes]]] = {
    "an altered box": _altered,
    "swapped boxes": lambda boxes: {**boxes, "south": boxes["east"], "east": boxes["south"]},
    "boxes of a few": lambda boxes: {"south": boxes["south"]},
}
