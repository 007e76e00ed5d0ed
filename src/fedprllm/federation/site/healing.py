"""One participant's part in healing: in every round, the gradient of its own windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedprllm.federation.site.computation import Computation
from fedprllm.federation.site.consent import check_request

__all__ = ["HealingRounds"]


_TOWARDS = {"text": "", "dense": ", towards what the dense model predicts"}


class HealingRounds(Computation):
    """One participant's rounds, which read and write its spool."""

    def run(self) -> None:
        """Compute the gradient of every round, waiting for the parameters that it begins with."""
        check_request(self.settings, self.job)  # before the seconds that importing torch takes

        from fedprllm.federation.site.model import open_own_dense
        from fedprllm.healing.config import HealConfig
        from fedprllm.healing.in_process import Learner
        from fedprllm.healing.participant import HealingText

        self.prepare()
        options = HealConfig(**self.job["heal"])
        config = options.model_copy(
            update={"device": self.config.device, "memory_limit": self.settings.memory_limit}
        )
        text, dense = HealingText(self.participant), None
        if config.loss == "dense":
            named, digest = self.job["model"], self.job["dense"]
            dense = open_own_dense(self.settings, named, digest, config.dtype, config.device)
        with Learner(self.model, config, self.spool.spilled_folder, dense) as learner:
            n_bytes = learner.n_bytes
            self.ask_for_consent(lambda n_runs, most: self._question(config, n_bytes, n_runs, most))
            for number in range(self.spool.n_ready, config.rounds + 1):
                self.check_owner()
                vector = self._parameters(learner, number)
                (sums,) = learner.contribute([text], vector, number).values()
                self._keep(number, sums)

    def _parameters(self, learner: Any, number: int) -> Any:
        """The parameters that a round begins with: those of the model, or what the coordinator sends."""
        from fedprllm.federation.protocol.parameters import decode_parameters

        if number == 0:
            return learner.tunable.initial()
        run, n = bytes.fromhex(self.job["run"]), learner.tunable.n
        return self.wait_for(
            number - 1, lambda message: decode_parameters(message, n, number - 1, run, self.digest)
        )

    def _keep(self, number: int, sums: Any) -> None:
        """Write a round's sums."""
        from fedprllm.federation.protocol import update as wire
        from fedprllm.federation.protocol.parameters import WORDS

        if self.config.secure:
            words = sums.words.numpy().view("<u8")
            self.keep(number, wire.MASKED, self.hidden_words(number, words), 0)
        else:
            self.keep(number, wire.GRADIENTS, {WORDS: sums.words}, sums.n_tokens)

    @property
    def _named(self) -> str:
        """The model to heal, for people."""
        of = self.job.get("of")
        return f"the result of run {of}" if of else Path(self.job["model"]).name

    def _question(self, config: Any, n_bytes: int, n_runs: int, most: int) -> dict[str, Any]:
        """Describe what healing asks of the participant, without anything of the text itself."""
        participant = self.participant
        n_tokens = config.round_windows * participant.windows.shape[1]
        return {
            "run": self.job["run"],
            "lines": [
                ["model", f"{self._named}, identical to yours in every tensor and setting"],
                ["purpose", f"heal it in {config.rounds} rounds{_TOWARDS[config.loss]}"],
                ["participants", ", ".join(sorted(self.job["participants"]))],
                [
                    "you send",
                    "gradients: in every round, the gradient of the loss on some of your text with respect "
                    "to norms, biases and one scale for each row of a Linear, and that loss",
                ],
                ["seen by", "the server only as a sum over participants" if config.secure else "the server"],
                ["size", f"{n_bytes / 1e6:,.2f} MB in each of {config.rounds + 1} rounds"],
                [
                    "computed from",
                    f"{config.round_windows} windows ({n_tokens:,} tokens) in each round, of "
                    f"{len(participant.windows)} windows chosen here",
                ],
                ["your text", f"used in {n_runs} of {most} runs, including this one"],
            ],
        }
