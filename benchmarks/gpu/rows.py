"""What is measured, and what was predicted for it before anything had run on a GPU."""

from dataclasses import dataclass, field

from .lengths import Lengths, hh_lengths, near

TRL, VARLEN, SEGMENTS = "trl", "varlen", "segments"


@dataclass(frozen=True)
class Row:
    """One setting: a model, how it is trained, and on what.

    Attributes:
        size: of `models.CONFIGS`.
        training: "lora", "qlora" or "full".
        data: "hh", or prompt and answer tokens as "2048+512".
        pairs: in a micro-batch.
        checkpointing: whether gradient checkpointing is on, TRL's default.
        batches: that are timed.
        arms: that run it, among TRL's, varlen and segments.
        predicted: milliseconds by arm on an H100, from a roofline; None where nothing was predicted.
    """

    size: str
    training: str
    data: str
    pairs: int
    checkpointing: bool = True
    batches: int = 6
    arms: tuple[str, ...] = (TRL, VARLEN)
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        kept = "" if self.checkpointing else ", no checkpointing"
        return f"{self.size} {self.training}, {self.data}, {self.pairs} pairs{kept}"

    def lengths(self, batch: int) -> list[Lengths]:
        """The lengths of a batch; no two batches have the same."""
        if self.data == "hh":
            return hh_lengths(self.pairs, self.pairs * batch)
        prompt, answer = (int(part) for part in self.data.split("+"))
        return near(prompt, answer, self.pairs, batch)


ALL = (TRL, VARLEN, SEGMENTS)
ROWS = (
    Row("8b", "lora", "hh", 8, batches=3, predicted={TRL: 692, VARLEN: 175}),
    Row("8b", "lora", "hh", 8, False, batches=3, predicted={VARLEN: 122}),
    Row("8b", "lora", "hh", 32, batches=2, predicted={TRL: 3663, VARLEN: 697}),
    Row("8b", "lora", "hh", 32, False, batches=2, arms=(VARLEN,), predicted={VARLEN: 486}),
    Row("8b", "lora", "1536+512", 2, False, batches=2),
    Row("8b", "lora", "1024+512", 2, batches=2),
    Row("8b", "lora", "2048+512", 2, batches=2),
    Row("8b", "lora", "4096+512", 2, batches=2),
    Row("8b", "full", "hh", 8, batches=3, predicted={TRL: 705, VARLEN: 179}),
    Row("8b", "full", "hh", 8, False, batches=3, arms=(VARLEN,), predicted={VARLEN: 136}),
    Row("8b", "full", "hh", 32, batches=2),
    Row("8b", "full", "hh", 32, False, batches=2, arms=(VARLEN,)),
    Row("8b", "full", "1536+512", 2, False, batches=2),
    Row("1.5b", "lora", "hh", 8, batches=4),
    Row("1.5b", "lora", "hh", 8, False, batches=4),
    Row("1.5b", "lora", "hh", 32, batches=3),
    Row("1.5b", "lora", "hh", 32, False, batches=3, arms=(VARLEN,)),
    Row("0.5b", "lora", "hh", 8, batches=4, arms=ALL, predicted={TRL: 79, VARLEN: 52, SEGMENTS: 109}),
    Row("0.5b", "lora", "hh", 8, False, batches=4),
    Row("0.5b", "lora", "hh", 32, batches=3, arms=ALL, predicted={TRL: 419, VARLEN: 80, SEGMENTS: 282}),
    Row("8b", "qlora", "hh", 8, batches=2),
    Row("8b", "qlora", "hh", 8, False, batches=2, arms=(VARLEN,)),
)
#: The same on a CPU in a second or two: that the program runs.
TRIAL = (
    Row("tiny", "lora", "hh", 2, batches=2, arms=ALL),
    Row("tiny", "lora", "64+16", 2, False, batches=2),
    Row("tiny", "full", "hh", 2, batches=2),
    Row("tiny", "qlora", "hh", 2, batches=2),
)
