"""``heal``: several participants heal one model together, in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedprllm.errors import ConfigError, ModelError, RunError
from fedprllm.evaluation.perplexity import perplexities
from fedprllm.evaluation.results import Perplexity
from fedprllm.healing.config import HealConfig
from fedprllm.healing.gradients import backward_bytes, held_out_losses, window_gradients
from fedprllm.healing.objectives import DenseDistance, NextToken, Objective
from fedprllm.healing.participant import HealingText
from fedprllm.healing.records import HealRecord, RoundRecord
from fedprllm.healing.result import heal_record, write_healed, write_healed_card
from fedprllm.healing.round_sums import RoundSums, round_bytes
from fedprllm.healing.run_folder import HealingRun
from fedprllm.healing.server import HealingServer, end_masked_round, end_round
from fedprllm.models.blockwise import BlockwiseModel
from fedprllm.models.fingerprints import model_digest
from fedprllm.models.identity import model_identity
from fedprllm.models.in_memory import model_folder, source_name
from fedprllm.models.open_blocks import OpenBlocks
from fedprllm.models.source import resolve_model
from fedprllm.models.tunable import TunableParameters
from fedprllm.progress import Progress, silent
from fedprllm.pruning.hidden_states import HiddenMemory
from fedprllm.pruning.inputs import (
    ParticipantInputs,
    Source,
    check_outside,
    evaluation_texts,
    identity_of,
    make_participants,
    name_participants,
    say_notes,
    sources_of,
)
from fedprllm.pruning.participant import Participant
from fedprllm.pruning.preflight import need_cryptography

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedprllm.healing.secure_rounds import SecureRounds

__all__ = ["HealResult", "Learner", "heal"]

_SHARE_OF_MEMORY = 4  # blocks stay in memory if they take at most this part of it


@dataclass(frozen=True)
class HealResult:
    """What healing left.

    Attributes:
        out: Its folder.
        model_dir: Folder of the healed model.
        evaluation: Perplexities ``before`` and ``healed``, if texts were given.
        record: Everything else: ``result.json``.
    """

    out: Path
    model_dir: Path
    evaluation: dict[str, list[Perplexity]]
    record: HealRecord

    @classmethod
    def load(cls, out: str | Path) -> HealResult:
        """Read the result from its folder.

        Raises:
            RunError: The folder is not that of a complete healing, or its record is damaged.
        """
        out = Path(out)
        if not (out / "result.json").exists():
            raise RunError(f"{out} has no result.json: run its command again")
        record = HealRecord.read(out / "result.json")
        return cls(out, out / record.models["model"], record.evaluation, record)


def heal(
    model: str | Path | PreTrainedModel,
    participants: ParticipantInputs,
    config: HealConfig | None = None,
    *,
    out: str | Path,
    dense: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    eval_texts: Source | Sequence[Source] | Mapping[str, Source] = (),
    progress: Progress = silent,
) -> HealResult:
    """Heal a pruned model together: train its norms, biases and one scale for each row of a Linear.

    In every round each participant adds up the gradient of the loss on a few windows of its own text, and the
    server takes one step with the sum of all: the same step as on the pooled text, bit by bit. A healing
    that was killed continues at the last finished round.

    Args:
        model: Hub id, local Hugging Face folder or a transformers model in memory: usually the ``model_dir``
            of a `fedprllm.prune`. The dense model can be healed too, as a reference: part of what healing
            gains is that the model gets to know the participants' text.
        participants: As for `fedprllm.prune`.
        config: How to heal.
        out: Folder of the healing, made if it does not exist.
        dense: The model before pruning, for ``loss="dense"``: hub id, folder or GGUF file.
        tokenizer: Of a model in memory, where participants hold text.
        eval_texts: Texts on which the model is evaluated before and after; none by default.
        progress: Called with what is done and how many steps it takes (see `fedprllm.progress`).

    Returns:
        The result; ``result.model_dir`` loads with ``AutoModelForCausalLM.from_pretrained``, and has the
        zeros, shapes and types of the model.

    Raises:
        ConfigError, DataError, ModelError: Bad input, found before the long computation.
        RunError: The folder belongs to something else or is in use, or the disk is full.
        UpdateError: A gradient is not finite, or out of proportion to the other participants'.

    Source: Zimmer et al., PERP (arXiv 2312.15230), for what is trained; McMahan et al. (arXiv 1602.05629),
    FedSGD.
    """
    config = config or HealConfig()
    if not isinstance(config, HealConfig):
        raise ConfigError(
            f"config must be a HealConfig, found {type(config).__name__}: HealConfig(**options)"
        )
    check_dense(config, dense)
    with model_folder(model, tokenizer) as folder:
        return _heal(folder, source_name(model), dense, participants, config, Path(out), eval_texts, progress)


def check_dense(config: HealConfig, dense: str | Path | None) -> None:
    """Check that the dense model is named if and only if the loss compares with it.

    Raises:
        ConfigError: It is not.
    """
    if config.loss == "dense" and dense is None:
        raise ConfigError(
            "loss dense compares with the model before pruning, and none is named: name it with dense"
        )
    if config.loss != "dense" and dense is not None:
        raise ConfigError(
            f"the dense model {dense} is named, but loss {config.loss} does not compare with it: choose loss "
            "dense, or do not name it"
        )


def open_dense(dense: str | Path, model: BlockwiseModel, config: HealConfig) -> BlockwiseModel:
    """Open the model before pruning.

    Args:
        dense: Hub id, folder or GGUF file.
        model: The model to heal.
        config: The options of healing.

    Raises:
        ModelError: It cannot be opened, or has another vocabulary.
    """
    found = BlockwiseModel(resolve_model(dense), config.dtype, config.device)
    if found.vocabulary_size != model.vocabulary_size:
        raise ModelError(
            f"the dense model {dense} has {found.vocabulary_size:,} tokens and the model to heal "
            f"{model.vocabulary_size:,}: name the model that it was pruned from"
        )
    return found


def _heal(
    folder: str | Path,
    source: str,
    dense: str | Path | None,
    participants: ParticipantInputs,
    config: HealConfig,
    out: Path,
    eval_texts: Source | Sequence[Source] | Mapping[str, Source],
    progress: Progress,
) -> HealResult:
    named = name_participants(participants)
    check_outside(out, sources_of(named, eval_texts))
    model = BlockwiseModel(
        resolve_model(folder, progress=progress), config.dtype, config.device, config.exclude
    )
    members, reading = make_participants(model, named, config.reading)
    config = config.model_copy(update={"window_length": reading.window_length})
    notes = say_notes(members)
    tests = evaluation_texts(model, eval_texts, reading)
    identity = identity_of(config, source, model, members, tests, progress)
    teacher = None
    if dense is not None:
        teacher = open_dense(dense, model, config)
        identity["dense"] = {
            "source": str(dense),
            "fingerprint": model_digest(model_identity(teacher, progress)).hex(),
        }
    with HealingRun(out, identity, model.checkpoint.n_bytes) as run:
        if run.is_complete:
            run.check_result()
        else:
            _run(model, teacher, members, config, run, tests, identity, notes, progress)
    return HealResult.load(out)


def secure_rounds(names: Sequence[str], config: HealConfig) -> SecureRounds | None:
    """What adds gradients up under masks; None if nobody asks for it.

    Raises:
        ConfigError: The library that it needs is not installed.
        SecureError: There are too few participants.
    """
    if not config.secure:
        return None
    need_cryptography()
    from fedprllm.healing.secure_rounds import SecureRounds

    return SecureRounds(names, config)


class Learner:
    """Computes gradients and losses of a model with given parameters.

    Args:
        model: The model.
        config: The options of healing.
        spilled: Folder for hidden states beyond the memory limit; its previous content is deleted.
        dense: The dense model, for the loss ``dense``.
    """

    def __init__(
        self, model: BlockwiseModel, config: HealConfig, spilled: Path, dense: BlockwiseModel | None = None
    ) -> None:
        self.model, self.config = model, config
        self.tunable = TunableParameters(model)
        self._memory = HiddenMemory(spilled, config.memory_limit)
        self._stack = ExitStack()
        room = _room(model, config)
        self._blocks = OpenBlocks(model, stay=room > 0)
        self._objective: Objective = NextToken()
        self._dense_blocks: OpenBlocks | None = None
        if config.loss == "dense":
            assert dense is not None, "the loss compares with the dense model"
            dense_room = _room(dense, config)
            room = min(room, dense_room)
            self._dense_blocks = OpenBlocks(dense, stay=dense_room > 0)
            self._objective = DenseDistance(dense, self._dense_blocks)
        self._room = room
        self._keeps: bool | None = None  # found with the first window

    def __enter__(self) -> Learner:
        self._stack.enter_context(self._blocks)
        if self._dense_blocks is not None:
            self._stack.enter_context(self._dense_blocks)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._memory.clear()

    @property
    def n_bytes(self) -> int:
        """Payload of what a participant shares in a round, in bytes."""
        return round_bytes(self.tunable.n)

    def n_steps(self, texts: Sequence[HealingText], number: int) -> int:
        """Number of steps that `contribute` reports for a round."""
        n_train = sum(len(text.windows_of(number, self.config)) for text in texts)
        n_held_out = sum(len(text.held_out_of(number, self.config)) for text in texts)
        return self.model.n_blocks * (2 * n_train + n_held_out)

    def contribute(
        self,
        texts: Sequence[HealingText],
        vector: Tensor,
        number: int,
        advance: Callable[[int], None] = lambda _: None,
    ) -> dict[str, RoundSums]:
        """What each participant adds to a round; all of them walk through the model together.

        Args:
            texts: The participants.
            vector: The parameters that the round begins with.
            number: Number of the round.
            advance: Called once for each window and block, forward and backward.

        Raises:
            UpdateError: A gradient or a loss is not finite.
        """
        sums = {text.name: RoundSums.zeros(self.tunable.n) for text in texts}
        owners = [(text.name, window) for text in texts for window in text.windows_of(number, self.config)]
        windows = [window for _, window in owners]
        model, tunable, most = self.model, self.tunable, self.config.max_gradient_norm
        if self._keeps is None and windows:
            self._keeps = self._room > 0 and self._room >= backward_bytes(
                model, tunable, vector, windows[0], self._blocks
            )
        found = window_gradients(
            model,
            tunable,
            vector,
            windows,
            self._blocks,
            self._memory,
            advance,
            self._objective,
            keep=bool(self._keeps),
        )
        for (name, window), (gradient, loss) in zip(owners, found, strict=True):
            sums[name].add_window(gradient, loss, len(window) - 1, most)
        owners = [(text.name, window) for text in texts for window in text.held_out_of(number, self.config)]
        windows = [window for _, window in owners]
        losses = held_out_losses(model, tunable, vector, windows, self._blocks, advance, self._objective)
        for (name, window), loss in zip(owners, losses, strict=True):
            sums[name].add_held_out(loss, len(window) - 1)
        return sums


def _room(model: BlockwiseModel, config: HealConfig) -> int:
    """Memory that is left if all blocks stay, in bytes; negative if they do not fit."""
    n_bytes: int = (
        2 * sum(parameter.numel() for parameter in model.skeleton.parameters()) * model.dtype.itemsize
    )
    if model.device.type == "cuda":
        limit: int = torch.cuda.mem_get_info(model.device)[0]
    elif config.memory_limit is not None:
        limit = config.memory_limit
    else:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // _SHARE_OF_MEMORY
    return limit - n_bytes


def _run(
    model: BlockwiseModel,
    dense: BlockwiseModel | None,
    members: Sequence[Participant],
    config: HealConfig,
    run: HealingRun,
    tests: Mapping[str, Sequence[Tensor]],
    identity: Mapping[str, Any],
    notes: Sequence[str],
    progress: Progress,
) -> None:
    texts = [HealingText(member) for member in members]
    secure = secure_rounds([member.name for member in members], config)
    with Learner(model, config, run.spilled_folder, dense) as learner:
        server = HealingServer(learner.tunable.initial(), config)
        records = run.resume(server)
        todo = range(len(records), config.rounds + 1)
        with progress("healing", sum(learner.n_steps(texts, number) for number in todo)) as advance:
            while not server.is_finished:
                records.append(_round(learner, texts, server, run, secure, advance))
        run.reopen_model()
        write_healed(run.unfinished_model_dir(), model, learner.tunable, server.result)
        run.publish_model()
    evaluation: dict[str, list[Perplexity]] = {}
    if tests:
        healed = BlockwiseModel(run.model_dir(), config.dtype, config.device)
        evaluation["before"] = perplexities(model, tests, progress)
        evaluation["healed"] = perplexities(healed, tests, progress)
    record = heal_record(identity, model, learner.tunable.n, server, records, run, evaluation, notes)
    write_healed_card(run.model_dir(), model.folder, record)
    run.finish(record)


def _round(
    learner: Learner,
    texts: Sequence[HealingText],
    server: HealingServer,
    run: HealingRun,
    secure: SecureRounds | None,
    advance: Callable[[int], None],
) -> RoundRecord:
    """Let all participants contribute, take the step and save it."""
    begin = time.monotonic()
    by_name = learner.contribute(texts, server.vector, server.number, advance)
    if secure is None:
        record = end_round(server, by_name, begin)
    else:
        record = end_masked_round(server, secure.total(server.number, by_name), begin)
    run.finish_round(record, server)
    return record
