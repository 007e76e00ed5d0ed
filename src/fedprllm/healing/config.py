"""The options of healing. Nothing here imports torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from fedprllm.config import Bos, Device, Dtype, LinearName, PruneConfig, WindowLength
from fedprllm.settings import Settings

__all__ = ["HealConfig"]


class HealConfig(Settings):
    """How to heal; immutable, validated on creation.

    Raises:
        ConfigError: A value is unknown or out of range.
    """

    rounds: Annotated[
        int, Field(ge=1, le=100_000, description="rounds: in each, every participant adds one gradient")
    ] = 40
    round_windows: Annotated[
        int, Field(ge=1, description="windows whose gradient a participant adds up in a round")
    ] = 1
    loss: Annotated[
        Literal["text", "dense"],
        Field(
            description="what to lower: text, the loss of predicting the next token, or dense, the distance "
            "to what the dense model predicts (Kullback-Leibler divergence)"
        ),
    ] = "text"
    learning_rate: Annotated[float, Field(gt=0, le=1, description="largest step of a parameter")] = 0.003
    max_gradient_norm: Annotated[
        float,
        Field(
            gt=0,
            description="longest gradient of the mean loss on a window; a longer one is shortened to it, so "
            "that no window and no participant has more weight than this",
        ),
    ] = 1.0
    check_every: Annotated[
        int, Field(ge=1, description="rounds between two measurements on held-out windows")
    ] = 10
    exclude: Annotated[
        tuple[LinearName, ...],
        Field(max_length=100, description="Linears without a scale, as in prune (repeat for several)"),
    ] = ()
    windows: Annotated[
        int,
        Field(
            ge=0,
            description="windows per participant, of which one in eight is held out, at most four; 0 uses "
            "all of its text",
        ),
    ] = 128
    window_length: WindowLength = None
    bos: Bos = "auto"
    dtype: Dtype = "float32"
    device: Device = "cpu"
    memory_limit: Annotated[
        ByteSize | None,
        Field(
            gt=0,
            exclude=True,
            description="most memory for hidden states and, if they fit, all blocks, such as 2GiB; the rest "
            "is kept in files",
        ),
    ] = None
    secure: Annotated[
        bool,
        Field(description="add gradients up under masks, so that only sums over participants are seen"),
    ] = False
    seed: Annotated[int, Field(ge=0, description="seed for choosing windows")] = 0

    @property
    def reading(self) -> PruneConfig:
        """The options of reading text, as pruning has them."""
        names = ("windows", "window_length", "bos", "dtype", "device", "memory_limit", "secure", "seed")
        return PruneConfig(**{name: getattr(self, name) for name in names})

    def is_check(self, number: int) -> bool:
        """Whether held-out windows are measured with the parameters that a round begins with."""
        return number % self.check_every == 0 or number == self.rounds
