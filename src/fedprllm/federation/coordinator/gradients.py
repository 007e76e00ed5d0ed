"""Gradients received over the network: checked before they count, and summed into a round's step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from fedprllm.errors import UpdateError
from fedprllm.federation.coordinator.masks import Masks
from fedprllm.federation.coordinator.results import Publication
from fedprllm.federation.protocol import update as wire
from fedprllm.federation.protocol.parameters import WORDS, encode_parameters
from fedprllm.files import write_bytes
from fedprllm.healing.bounds import outstanding_gradients
from fedprllm.healing.config import HealConfig
from fedprllm.healing.records import RoundRecord
from fedprllm.healing.round_sums import GRADIENTS, RoundSums, n_words
from fedprllm.healing.run_folder import HealingRun
from fedprllm.healing.server import HealingServer, end_masked_round, end_round
from fedprllm.pruning.held_out import MOST_HELD_OUT

__all__ = ["Gradients", "Healing"]

_MOST_NATS = 100.0  # mean loss per token; that of a uniform guess among e^100 tokens


class Gradients:
    """What participants send in the rounds of a healing, stored in files by round and participant.

    Args:
        n: Number of parameters.
        config: The options of healing, resolved.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
        folder: Maps a round to the folder with its messages, one file ``NAME.update`` per participant.
        masks: The session of secure aggregation, if messages arrive under masks.
    """

    follows_server = True

    def __init__(
        self,
        n: int,
        config: HealConfig,
        run_id: bytes,
        digest: bytes,
        folder: Callable[[int], Path],
        masks: Masks | None = None,
    ) -> None:
        self._n, self._config, self.masks = n, config, masks
        self._run_id, self._digest, self._folder = run_id, digest, folder

    @property
    def n_steps(self) -> int:
        """Number of rounds; the last one only measures."""
        return self._config.rounds + 1

    def path(self, block: int, name: str) -> Path:
        """See `Inbox`."""
        return self._folder(block) / f"{name}.update"

    def _expectation(self, number: int, name: str) -> wire.Expectation:
        return wire.Expectation(
            run_id=self._run_id,
            model_fingerprint=self._digest,
            block=number,
            kind=wire.GRADIENTS if self.masks is None else wire.MASKED,
            shapes={WORDS: (n_words(self._n),)},
            participant=name,
        )

    def max_bytes(self, block: int, name: str) -> int:
        """See `Inbox`."""
        return wire.max_message_bytes(self._expectation(block, name))

    def _read(self, number: int, name: str, message: bytes | memoryview) -> RoundSums:
        expect = self._expectation(number, name)
        update = wire.decode(message, expect=expect, max_bytes=wire.max_message_bytes(expect))
        return RoundSums(update.tensors[WORDS])

    def check(self, block: int, name: str, message: bytes | memoryview) -> None:
        """See `Inbox`."""
        sums = self._read(block, name, message)
        if self.masks is None:
            self.check_sums(block, sums, 1, f"participant '{name}'")

    def check_sums(self, number: int, sums: RoundSums, n: int, whose: str) -> None:
        """Check that honest participants can add up to sums.

        Args:
            number: Number of the round.
            sums: The sums.
            n: Number of participants behind them.
            whose: Whose sums they are, for errors.

        Raises:
            UpdateError: They cannot.
        """
        config, per_window = self._config, (self._config.window_length or 2) - 1
        n_train = 0 if number >= config.rounds else config.round_windows * n
        n_held_out = MOST_HELD_OUT * n if config.is_check(number) else 0
        for what, found, most in (
            ("tokens", sums.n_tokens, n_train * per_window),
            ("held-out tokens", sums.n_held_out, n_held_out * per_window),
        ):
            if found % per_window or not 0 <= found <= most:
                raise UpdateError(
                    f"{whose} claims {found} {what} in round {number}: expected whole windows of "
                    f"{per_window} predicted tokens, at most {most} tokens"
                )
        if sums.n_tokens != n_train * per_window:
            raise UpdateError(
                f"{whose} sums gradients over {sums.n_tokens} tokens in round {number}: expected "
                f"{n_train * per_window}"
            )
        if sums.exceeds(n_train, config.max_gradient_norm):
            raise UpdateError(
                f"{whose} has a gradient longer than that of {n_train} windows can be in round {number}: "
                f"expected a length of at most {config.max_gradient_norm:g} per token and numbers below "
                f"{GRADIENTS.limit:.3g} for each window"
            )
        losses = (sums.loss, sums.n_tokens), (sums.held_out_loss, sums.n_held_out)
        for loss, n_tokens in losses:
            if n_tokens and not 0 <= loss <= _MOST_NATS:
                raise UpdateError(
                    f"{whose} has a loss of {loss:g} nats per token in round {number}: expected 0 to "
                    f"{_MOST_NATS:g}"
                )

    def outstanding(self, block: int, names: Sequence[str]) -> dict[str, str]:
        """See `Inbox`."""
        return {} if self.masks is not None else outstanding_gradients(self.by_name(block, names))

    def by_name(self, number: int, names: Sequence[str]) -> dict[str, RoundSums]:
        """What participants sent in a round."""
        return {
            name: self._read(number, name, self.path(number, name).read_bytes()) for name in sorted(names)
        }

    def total(self, number: int, masks: Masks) -> RoundSums:
        """The sum of what participants sent in a round under masks, one message in memory at a time.

        Raises:
            UpdateError: Honest participants cannot add up to it. Nobody can say whose message is at fault.
        """
        names = masks.survivors(number)
        total = np.zeros(n_words(self._n), "<u8")
        for name in names:
            total += self._read(number, name, self.path(number, name).read_bytes()).words.numpy().view("<u8")
        masks.unmask(number, total)
        sums = RoundSums(torch.from_numpy(total.view("<i8").astype(np.int64)))
        self.check_sums(number, sums, len(names), "the sum")
        return sums


class Healing:
    """Ends every round with a step, and has the parameters for the next one.

    Args:
        gradients: What participants sent.
        server: The server's parameters.
        run: The run folder, open.
        run_id: Id of the run, 16 bytes.
        digest: Digest of the model's weights, 32 bytes.
    """

    def __init__(
        self, gradients: Gradients, server: HealingServer, run: HealingRun, run_id: bytes, digest: bytes
    ) -> None:
        self._gradients, self._server, self._run = gradients, server, run
        self._run_id, self._digest = run_id, digest
        self.records: list[RoundRecord] = run.resume(server)

    def decide(self, index: int, names: Sequence[str], still_in: Sequence[str]) -> None:
        """See `BlockDecider`."""
        begin, masks = time.monotonic(), self._gradients.masks
        if masks is None:
            record = end_round(self._server, self._gradients.by_name(index, names), begin)
        else:
            record = end_masked_round(self._server, self._gradients.total(index, masks), begin)
        record = record.model_copy(update={"participants": sorted(names), "still_in": sorted(still_in)})
        self._run.finish_round(record, self._server)
        self.records.append(record)

    def decision(self, index: int) -> bytes | None:
        """See `BlockDecider`."""
        assert index == self._server.number - 1, "only the newest parameters are kept"
        return encode_parameters(self._server.vector, index, self._run_id, self._digest)

    def still_in(self) -> Sequence[str] | None:
        """See `BlockDecider`."""
        return (self.records[-1].still_in or ()) if self.records else None

    def finish(self) -> None:
        """Keep the parameters of the result as a message for participants."""
        message = encode_parameters(self._server.result, 0, self._run_id, self._digest)
        write_bytes(Publication(self._run.folder).decision_path(0), message)
