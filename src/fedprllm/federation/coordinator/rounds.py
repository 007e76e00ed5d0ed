"""The coordinator's rounds, independent of the transport: asking, collecting, deciding, leaving out.

The coordinator fetches the update of a block from one participant at a time, checks it before it counts, and
keeps it in the run's folder until the block is decided. Its memory is therefore bounded by one block and one
update, an interrupted run can continue, and the order in which participants answer does not matter.

RUN/federation/
  status.json                      progress, for display
  events.jsonl                     which participants were refused or left out, when and why
  updates/block-0007/NAME.update   updates that wait for the decision about their block
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from fedprllm.config import PruneConfig
from fedprllm.core.owl import Outliers
from fedprllm.errors import UpdateError
from fedprllm.federation.coordinator.ballots import Inbox
from fedprllm.federation.coordinator.decisions import BlockDecider
from fedprllm.federation.coordinator.masks import Masks
from fedprllm.federation.plan import RunPlan
from fedprllm.federation.protocol.channel import Channel, Interrupted, QuorumLost
from fedprllm.federation.protocol.masks import Agreement, read_shares
from fedprllm.federation.protocol.messages import Operation, Reason, Reply, Request, pack, read_reply
from fedprllm.files import append_line, write_bytes, write_json
from fedprllm.healing.config import HealConfig
from fedprllm.models.identity import entry_name
from fedprllm.pruning.records import ModelRecord
from fedprllm.pruning.run_folder import Run

__all__ = ["Ask", "Coordinator"]

_POLL_S = 0.2  # shortest pause between two polls
_MAX_POLL_S = 5.0
_PATIENT = 20  # pause for 1/20 of the time since the last progress: news is noticed at most 5 % late
_ANSWER_S = 5.0  # timeout of a small request; a slower participant is asked again
_SLOWEST_BYTES_PER_S = 250_000  # 2 Mbit/s; a slower connection counts as none
_FAREWELL_S = 2.0  # timeout of a message to a participant that may be gone


@dataclass
class _Standing:
    """What the coordinator knows about a participant. Times are in seconds of the coordinator's clock.

    Attributes:
        n_ready: Number of updates it claims to have.
        last_answer: Time of its last answer.
        deadline: Time by which its next update must have arrived.
        n_invalid: Number of consecutive updates that were invalid or did not arrive.
        lost_at: Time when it last failed to deliver an update.
        n_decisions: Number of blocks whose decision it has received.
        outstanding: Blocks whose last update was refused because it is out of proportion to the others'.
    """

    n_ready: int = 0
    last_answer: float = 0.0
    deadline: float = 0.0
    n_invalid: int = 0
    lost_at: float = -1.0
    n_decisions: int = 0
    outstanding: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class Ask:
    """What a run, or its preceding survey, asks of the participants.

    Attributes:
        run_id: Id of the run, 16 bytes.
        config: Resolved pruning options.
        fingerprints: Identity of the coordinator's model (`model_identity`).
        samples: The blocks that each participant prunes, by name.
        survey: Count outliers of the unpruned model instead of pruning it.
        outliers: Outliers by block that the survey found.
        heal: Resolved options of healing; None of a run that prunes. Its rounds count as blocks.
        of: Id of the run whose result is healed, in hexadecimal digits; empty if it is another model.
        dense: The model before pruning, where healing compares with it.
    """

    run_id: bytes
    config: PruneConfig
    fingerprints: Mapping[str, str]
    samples: Mapping[str, Sequence[int]]
    survey: bool = False
    outliers: Sequence[Outliers] = ()
    heal: HealConfig | None = None
    of: str = ""
    dense: ModelRecord | None = None


class Coordinator:
    """Conducts one run to its end, starting at the state recorded in its folder.

    Args:
        ask: What is asked of the participants.
        ballots: Checks and stores their updates.
        decider: Finishes blocks.
        plan: Participants, quorum and deadlines.
        names: Names of all participants in the run.
        run: The folder of the run or of the survey, open.
        channel: Transport to the participants.
        folder: Folder for the coordinator's own files.
        stopped: Called between steps. True ends the job.
        revoked: Called between steps. Names participants whose part ends, also while the run goes on.
        clock: Returns seconds, for deadlines.
    """

    def __init__(
        self,
        ask: Ask,
        ballots: Inbox,
        decider: BlockDecider,
        plan: RunPlan,
        names: Sequence[str],
        run: Run,
        channel: Channel,
        folder: Path,
        stopped: Callable[[], bool] = lambda: False,
        revoked: Callable[[], Collection[str]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask_for, self.ballots, self._decider = ask, ballots, decider
        self.plan, self.run, self.channel = plan, run, channel
        self._folder, self._stopped, self._revoked, self._clock = folder, stopped, revoked, clock
        self._news = clock()
        self._n_blocks, self._follows_server = ballots.n_steps, ballots.follows_server
        self._samples = ask.samples
        self.participants = {name: _Standing() for name in sorted(self._still_in(names))}

    @property
    def _step(self) -> str:
        """What is decided one after another."""
        return "block" if self._ask_for.heal is None else "round"

    @property
    def _run_id(self) -> str:
        return self._ask_for.run_id.hex()

    # Files -------------------------------------------------------------------------------------

    def _still_in(self, names: Sequence[str]) -> Sequence[str]:
        """Participants that may still take part: initially all, later those in the newest block's record."""
        found = self._decider.still_in()
        return names if found is None else found

    def _note(self, name: str, event: str, reason: str) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "participant": name,
            "event": event,
            "reason": reason,
        }
        append_line(self._folder / "events.jsonl", json.dumps(line))

    def _show(self, doing: str) -> None:
        participants = {
            name: {"n_ready": standing.n_ready, "n_missing": self._n_missing(name)}
            for name, standing in self.participants.items()
        }
        status = {
            "doing": doing,
            "steps": f"{self._step}s",
            "n_blocks": self._n_blocks,
            "n_finished": self.run.n_finished,
            "participants": participants,
            "time": time.time(),
        }
        write_json(self._folder / "status.json", status, durable=False)

    def _n_missing(self, name: str) -> int:
        return sum(
            not self.ballots.path(block, name).exists()
            for block in range(self.run.n_finished, self._n_blocks)
        )

    # The run -----------------------------------------------------------------------------------

    def conduct(self) -> None:
        """Decide every block that has not been decided yet.

        Raises:
            QuorumLost: Too few participants remain.
            Interrupted: A participant has disappeared and may come back, or the job was stopped.
        """
        blocks = range(self.run.n_finished, self._n_blocks)
        self._drop_damaged(blocks)
        if self._missing(blocks) or self._needs_shares(blocks):
            self._start(blocks)
            self._repeat_farewells()
            if self.ballots.masks is not None:
                self._exchange_keys(self.ballots.masks)
        if self._follows_server:
            for block in blocks:
                self._collect([block])
                self._unmask([block])
                self._decide(block)
        else:
            # A participant's walk counts as a whole or not at all, so no block is decided before all
            # updates have arrived.
            self._collect(blocks)
            self._unmask(blocks)
            for block in blocks:
                self._decide(block)
        self._show("finished")

    def finish(self) -> None:
        """Tell all participants that the run is complete. One that misses this keeps its spool longer."""
        self._ask(list(self.participants), Request(op="finish", run=self._run_id))
        shutil.rmtree(self._folder / "updates", ignore_errors=True)
        if self.ballots.masks is not None:
            self.ballots.masks.forget()

    def _drop_damaged(self, blocks: Sequence[int]) -> None:
        """Delete updates that an earlier job received and that the disk has damaged: they are sent again."""
        for name in self.participants:
            for block in blocks:
                path = self.ballots.path(block, name)
                if path.exists() and not self._is_whole(name, block, path.read_bytes()):
                    self._note(
                        name, f"update of {self._step} {block} lost", f"{path} is damaged; it is sent again"
                    )
                    path.unlink()

    def _is_whole(self, name: str, block: int, message: bytes) -> bool:
        if block not in self._samples[name]:
            return message == b""
        try:
            self.ballots.check(block, name, message)
        except UpdateError:
            return False
        return True

    def _start(self, blocks: Sequence[int]) -> None:
        """Send all participants the request, and leave out those that do not answer in time.

        A participant whose disk is full has as much time as it has for its first block.
        """
        self._show("waiting for participants")
        payload = json.dumps(dict(self._ask_for.fingerprints)).encode()
        begin = self._clock()
        waiting, full = set(self._missing(blocks)), set[str]()
        if self.ballots.masks is not None:
            waiting = set(self.participants)  # also those that only have to give shares of masks
        while waiting and self._clock() - begin < self._start_patience_s(waiting & full):
            self._check_stopped()
            waiting &= set(self._dismiss_revoked())
            for name, (reply, _) in self._ask_to_start(sorted(waiting), payload).items():
                self._heard(name, reply)
                if reply.code == "disk full":
                    full.add(name)
                else:
                    waiting.discard(name)
            if waiting:
                self._show(f"waiting for {', '.join(sorted(waiting))}")
                time.sleep(_POLL_S)
        for name in sorted(waiting & set(self.participants)):
            reason: Reason = "deadline" if name in full else "absent"
            words = "its disk is full" if name in full else f"did not answer within {self.plan.join_s:.0f} s"
            self._leave_out(name, reason, words)
        now = self._clock()
        for standing in self.participants.values():
            standing.last_answer = now
            standing.deadline = now + self.plan.start_s + self.plan.deadline_s
        self._check_quorum()

    def _start_patience_s(self, full: Collection[str]) -> float:
        """Seconds to wait for the answers to the request."""
        return self.plan.start_s + self.plan.deadline_s if full else self.plan.join_s

    def _ask_to_start(self, names: Sequence[str], payload: bytes) -> dict[str, tuple[Reply, memoryview]]:
        """Ask each participant to prune its blocks. Participants with the same blocks share one request."""
        answers: dict[str, tuple[Reply, memoryview]] = {}
        for blocks in {tuple(self._samples[name]) for name in names}:
            request = Request(
                op="start",
                run=self._run_id,
                model=self.plan.model if self._ask_for.dense is None else self._ask_for.dense.source,
                config=self._ask_for.config.model_dump(mode="json"),
                survey=self._ask_for.survey,
                blocks=list(blocks),
                participants=sorted(self._samples),
                outliers=[(found.n_outliers, found.n_scores) for found in self._ask_for.outliers],
                heal=None if self._ask_for.heal is None else self._ask_for.heal.model_dump(mode="json"),
                of=self._ask_for.of,
                dense="" if self._ask_for.dense is None else self._ask_for.dense.fingerprint,
            )
            alike = [name for name in names if tuple(self._samples[name]) == blocks]
            answers |= self._ask(alike, request, payload)
        return answers

    # Secure aggregation ------------------------------------------------------------------------

    def _needs_shares(self, blocks: Sequence[int]) -> bool:
        masks = self.ballots.masks
        return masks is not None and bool(blocks) and not masks.has_shares(blocks)

    def _exchange_keys(self, masks: Masks) -> None:
        """Pass keys and boxes of shares on. Participants that do not answer in time are left out."""
        self._show("exchanging keys")
        if not masks.has_adverts:
            opening = masks.opening.pack()
            answers = self._gather("keys", dict.fromkeys(self.participants, opening))
            self._drop_refused(masks.keep_adverts(answers))
        if not masks.has_boxes:
            answers = self._gather("shares", dict.fromkeys(self.participants, masks.adverts()))
            self._drop_refused(masks.keep_boxes(answers))
        for name in sorted(set(self.participants) - set(masks.members)):
            self._leave_out(name, "deadline", "its keys did not arrive in time")
        self._check_quorum()
        self._gather("boxes", {name: masks.boxes_for(name) for name in self.participants})

    def _drop_refused(self, refused: Mapping[str, str]) -> None:
        for name, words in refused.items():
            if name in self.participants:
                self._leave_out(name, "invalid updates", words)
        self._check_quorum()

    def _gather(
        self, op: Operation, payloads: Mapping[str, bytes], least: int | None = None
    ) -> dict[str, bytes]:
        """Ask participants for one step, until all have answered.

        Args:
            op: The step.
            payloads: What each is asked.
            least: With so many answers, the others are not waited for; otherwise, they are left out.
        """
        answers: dict[str, bytes] = {}
        begin = self._clock()
        while waiting := [name for name in payloads if name in self.participants and name not in answers]:
            self._check_stopped()
            self._dismiss_revoked()
            if self._clock() - begin > self.plan.join_s:
                break
            for name in waiting:
                request = Request(op=op, run=self._run_id)
                patience_s = self._patience_s(len(payloads[name]))
                for heard, (reply, content) in self._ask([name], request, payloads[name], patience_s).items():
                    self._heard(heard, reply)
                    if reply.state != "failed" and reply.code != "disk full":
                        answers[heard] = bytes(content)
            if least is not None and len(answers) >= least:
                return answers
            self._check_quorum()
            if len(answers) < len(payloads):
                time.sleep(_POLL_S)
        for name in [] if least is not None else waiting:
            self._leave_out(name, "absent", f"did not answer '{op}' within {self.plan.join_s:.0f} s")
        self._check_quorum()
        return answers

    def _unmask(self, blocks: Sequence[int]) -> None:
        """Have the participants agree on whose updates of some blocks are added up, and open the masks.

        Raises:
            QuorumLost: Too few participants are left for a sum.
        """
        masks = self.ballots.masks
        if masks is None or not blocks or masks.has_shares(blocks):
            return
        self._show("unmasking")
        survivors = {block: self._pruning(block) for block in blocks}
        short = [block for block, names in survivors.items() if len(names) < masks.limit]
        if short:
            raise QuorumLost(
                f"{len(survivors[short[0]])} updates of {self._step} {short[0]} are left, and a sum under "
                f"masks needs {masks.limit}: begin a new run"
            )
        agreement = masks.agree_on(survivors)
        signatures = self._enough("agree", agreement, masks.limit)
        signed = agreement.model_copy(update={"signatures": {n: s.hex() for n, s in signatures.items()}})
        answers = self._enough("unmask", signed, masks.limit)
        masks.keep_shares(blocks, {name: read_shares(answer) for name, answer in answers.items()})

    def _enough(self, op: Operation, agreement: Agreement, least: int) -> dict[str, bytes]:
        answers = self._gather(op, dict.fromkeys(self.participants, agreement.pack()), least)
        if len(answers) < least:
            raise QuorumLost(
                f"{len(answers)} participants answered '{op}', and {least} are needed: run it again when the "
                "participants are back"
            )
        return answers

    def _collect(self, blocks: Sequence[int]) -> None:
        """Collect the updates of the given blocks until all have arrived and none is out of proportion."""
        self._collect_missing(blocks)
        while self._refuse_outstanding(blocks):
            self._collect_missing(blocks)

    def _refuse_outstanding(self, blocks: Sequence[int]) -> bool:
        """Compare the updates of each block with each other, and refuse those that are out of proportion.

        Returns:
            Whether updates of a block were refused; later blocks have then not been compared.
        """
        for block in blocks:
            refused = self.ballots.outstanding(block, self._pruning(block))
            for name in self._pruning(block):
                self.participants[name].outstanding.discard(block)
            for name, reason in refused.items():
                self.ballots.path(block, name).unlink()
                self.participants[name].outstanding.add(block)
                self._refuse(name, block, UpdateError(reason))
            if refused:
                self._check_quorum()
                return True
        return False

    def _pruning(self, block: int) -> list[str]:
        """The remaining participants that prune a block."""
        return [name for name in self.participants if block in self._samples[name]]

    def _collect_missing(self, blocks: Sequence[int]) -> None:
        """Collect the updates of the given blocks from all remaining participants."""
        while missing := self._still_missing(blocks):
            self._listen({name: wanted[0] for name, wanted in missing.items()})
            ready = [
                (name, wanted[0])
                for name, wanted in missing.items()
                if name in self.participants and self._may_be_asked(self.participants[name], wanted[0])
            ]
            for name, block in ready:
                if name in self.participants:  # fetching takes long enough to be revoked meanwhile
                    self._fetch(name, block)
            self._check_quorum()
            self._show(f"{self._step} {blocks[0]}" if len(blocks) == 1 else "collecting")
            if not ready:
                time.sleep(self._pause_s())

    def _pause_s(self) -> float:
        """Seconds until the next poll: longer while there is no progress, because polls cause traffic."""
        since_news = self._clock() - self._news
        return min(max(_POLL_S, since_news / _PATIENT), _MAX_POLL_S, self.plan.silence_s / 4)

    def _missing(self, blocks: Sequence[int]) -> dict[str, list[int]]:
        """Blocks whose update has not arrived, by participant. Participants that sent all are omitted."""
        missing = {
            name: [block for block in blocks if not self.ballots.path(block, name).exists()]
            for name in self.participants
        }
        return {name: wanted for name, wanted in missing.items() if wanted}

    def _still_missing(self, blocks: Sequence[int]) -> dict[str, list[int]]:
        """Blocks whose update has not arrived, of those who may still send one."""
        self._check_stopped()
        self._dismiss_revoked()
        return self._missing(blocks)

    def _decide(self, block: int) -> None:
        self._check_stopped()
        # Its updates for this block and later ones do not count, even those that have arrived.
        self._dismiss_revoked()
        self._check_quorum()
        self._show(f"deciding {self._step} {block}")
        masks = self.ballots.masks
        names = self._pruning(block) if masks is None else masks.survivors(block)
        if not names:
            raise QuorumLost(
                f"no participant is left for {self._step} {block}: {self._folder / 'events.jsonl'} says why; "
                "decided blocks are kept; run it again when the participants are back"
            )
        self._decider.decide(block, names, list(self.participants))
        shutil.rmtree(self.ballots.path(block, names[0]).parent)
        now = self._news = self._clock()
        for standing in self.participants.values():
            standing.last_answer = now
            standing.deadline = max(standing.deadline, now + self.plan.deadline_s)

    # Participants ------------------------------------------------------------------------------

    def _ask(
        self, names: Sequence[str], request: Request, payload: bytes = b"", timeout_s: float = _ANSWER_S
    ) -> dict[str, tuple[Reply, memoryview]]:
        """Send a request and parse the answers. An unreadable answer is logged and ignored."""
        answers = {}
        for name, message in self.channel.ask(names, pack(request, payload), timeout_s).items():
            try:
                answers[name] = read_reply(message)
            except UpdateError as error:
                self._note(name, "unreadable answer", str(error))
        return answers

    def _listen(self, waited_for: Mapping[str, int]) -> None:
        """Ask participants for their progress, and leave out those that failed or are late.

        Args:
            waited_for: First block whose update is missing, by participant.

        Raises:
            Interrupted: A participant has been silent for too long.
        """
        self._deliver_decision(waited_for)
        present = [name for name in waited_for if name in self.participants]
        for name, (reply, _) in self._ask(present, Request(op="state", run=self._run_id)).items():
            self._heard(name, reply)
        now = self._clock()
        for name, block in waited_for.items():
            standing = self.participants.get(name)
            if standing is None:
                continue
            if now - standing.last_answer > self.plan.silence_s:
                raise Interrupted(f"participant '{name}' has not answered for {self.plan.silence_s:.0f} s")
            if standing.n_ready <= block and now > standing.deadline:
                self._leave_out(name, "deadline", f"{self._step} {standing.n_ready} was not ready in time")

    def _deliver_decision(self, waited_for: Mapping[str, int]) -> None:
        """Send the newest decision to the participants that need it for their next block."""
        n_decided = self.run.n_finished
        if not (n_decided and self._follows_server):
            return
        without = [name for name in waited_for if self.participants[name].n_decisions < n_decided]
        if not without:
            return
        message = self._decider.decision(n_decided - 1)
        if message is None:
            return
        request = Request(op="decision", run=self._run_id, block=n_decided - 1)
        # One at a time: the engine keeps one copy of a message per recipient.
        for asked in without:
            answers = self._ask([asked], request, message, self._patience_s(len(message)))
            for name, (reply, _) in answers.items():
                if reply.code != "disk full":
                    self.participants[name].n_decisions = n_decided
                self._heard(name, reply)

    def _heard(self, name: str, reply: Reply) -> None:
        standing = self.participants[name]
        now = self._clock()
        standing.last_answer = now
        if reply.state == "failed":
            self._leave_out(name, "failed", self._words(reply))
        elif reply.n_ready > standing.n_ready:
            # A claim is free, so only an update that has arrived extends the deadline.
            standing.n_ready = min(reply.n_ready, self._n_blocks)
            self._news = now

    def _words(self, reply: Reply) -> str:
        """Describe a participant's failure in fixed words. Text that it sends is never repeated."""
        known = self._ask_for.fingerprints
        if reply.tensor not in known:
            return reply.code
        if reply.value is None:
            return f"{reply.code}: '{reply.tensor}'"
        return f"{reply.code}: {entry_name(reply.tensor)}: {known[reply.tensor]} here, {reply.value:g} there"

    def _patience_s(self, n_bytes: int) -> float:
        """Seconds that a message of this length may take."""
        return self.plan.silence_s + n_bytes / _SLOWEST_BYTES_PER_S

    def _may_be_asked(self, standing: _Standing, block: int) -> bool:
        """Whether a participant claims to have the update and has answered since its last failed delivery.

        An unreachable participant therefore counts as silent, not as failing to deliver.
        """
        return standing.n_ready > block and standing.last_answer > standing.lost_at

    def _fetch(self, name: str, block: int) -> None:
        """Fetch one update. Store it if it is valid; otherwise have it computed again."""
        if block not in self._samples[name]:
            write_bytes(self.ballots.path(block, name), b"")
            return
        standing = self.participants[name]
        request = Request(op="fetch", run=self._run_id, block=block)
        patience_s = self._patience_s(self.ballots.max_bytes(block, name))
        answers = self._ask([name], request, timeout_s=patience_s)
        if name not in self._dismiss_revoked():
            return
        if name not in answers:
            standing.lost_at = self._clock()
            standing.n_invalid += 1
            if standing.n_invalid >= self.plan.max_ballots:
                self._leave_out(name, "deadline", f"the update of {self._step} {block} did not arrive")
            return
        reply, payload = answers[name]
        standing.last_answer = self._clock()
        if reply.state == "failed":
            self._leave_out(name, "failed", self._words(reply))
            return
        if reply.code == "disk full":
            # Nothing leaves without a line in its ledger. Its deadline for this block still holds.
            standing.n_ready = min(standing.n_ready, block)
            return
        if reply.code == "not ready":
            self._count_invalid(name, block, "it claimed that the update was ready but does not have it")
            return
        try:
            self.ballots.check(block, name, payload)
        except UpdateError as error:
            self._refuse(name, block, error)
            return
        if not standing.outstanding:
            standing.n_invalid = 0
        standing.deadline = max(standing.deadline, self._clock() + self.plan.deadline_s)
        write_bytes(self.ballots.path(block, name), payload)

    def _refuse(self, name: str, block: int, error: UpdateError) -> None:
        """Have an invalid update computed again."""
        if not self._count_invalid(name, block, str(error)):
            return
        self.participants[name].deadline = self._clock() + self.plan.start_s + self.plan.deadline_s
        self._ask([name], Request(op="refused", run=self._run_id, block=block))

    def _count_invalid(self, name: str, block: int, reason: str) -> bool:
        """Count an update that is invalid or was falsely claimed.

        Returns:
            Whether the participant still takes part.
        """
        standing = self.participants[name]
        standing.n_invalid += 1
        standing.n_ready = min(standing.n_ready, block)
        self._note(name, f"update of {self._step} {block} refused", reason)
        if standing.n_invalid >= self.plan.max_ballots:
            self._leave_out(name, "invalid updates", f"{standing.n_invalid} in a row")
            return False
        return True

    def _dismiss_revoked(self) -> Collection[str]:
        """Leave out participants that were revoked; returns those that still take part."""
        for name in sorted(set(self._revoked()) & set(self.participants)):
            self._leave_out(name, "revoked", "the coordinator revoked it; what is decided already stays")
        return self.participants

    def _leave_out(self, name: str, reason: Reason, words: str) -> None:
        self._note(name, "left out", f"{reason}: {words}")
        del self.participants[name]
        self._tell_left_out(name, reason)

    def _tell_left_out(self, name: str, reason: Reason) -> None:
        """Tell a participant, in fixed words, that the run goes on without it. It may be gone."""
        if reason == "revoked":
            return  # the server has closed its connection, and told it why
        farewell = Request(op="left out", run=self._run_id, reason=reason)
        self._ask([name], farewell, timeout_s=_FAREWELL_S)

    def _repeat_farewells(self) -> None:
        """Tell participants that an earlier job left out: they are there again, and are asked nothing."""
        for name, reason in self._left_out_before().items():
            if name in self._samples and name not in self.participants:
                self._tell_left_out(name, reason)

    def _left_out_before(self) -> dict[str, Reason]:
        path = self._folder / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        events = [event for event in map(json.loads, lines) if event["event"] == "left out"]
        words = {event["participant"]: event["reason"].partition(":")[0] for event in events}
        return {name: reason for name, reason in words.items() if reason in get_args(Reason)}

    def _check_quorum(self) -> None:
        quorum = self.plan.quorum
        if self.ballots.masks is not None:
            quorum = max(quorum, self.ballots.masks.limit)
        if len(self.participants) < quorum:
            left = ", ".join(self.participants) or "none"
            self._show("quorum lost")
            raise QuorumLost(
                f"{len(self.participants)} participants are left ({left}), the quorum is {quorum}: "
                f"{self._folder / 'events.jsonl'} says why the others were left out; decided blocks are "
                "kept; run it again when the participants are back"
            )

    def _check_stopped(self) -> None:
        if self._stopped():
            raise Interrupted("the job was stopped")
