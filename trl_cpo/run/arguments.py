"""The options of a run: TRL's ScriptArguments, DPOConfig and ModelConfig, with a run's defaults."""

from dataclasses import dataclass, field

from trl import ModelConfig, ScriptArguments

from ..config import CPOConstrainedConfig
from ..constraint_fields import FormName


@dataclass
class PairArguments(ScriptArguments):
    """Which pairs to train on."""

    dataset_name: str = field(
        default="Anthropic/hh-rlhf",
        metadata={"help": "Hub name, local .jsonl[.gz], .json or .parquet file, folder, 'demo' or 'demo-answers' (embedded)."},
    )
    dataset_data_dir: str | None = field(
        default=None, metadata={"help": "Folder inside the dataset, such as harmless-base in HH-RLHF."}
    )
    held_out: float = field(
        default=0.1,
        metadata={"help": "Where the dataset has but one split: the fraction (below 1) or number of pairs held out."},
    )
    max_train_pairs: int | None = field(default=None, metadata={"help": "Train on the first so many pairs only."})
    max_test_pairs: int | None = field(default=1000, metadata={"help": "Evaluate on the first so many pairs only."})


@dataclass
class RunConfig(CPOConstrainedConfig):
    """CPOConstrainedConfig with a run's defaults."""

    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where everything goes; by default outputs/<dataset>-<constraint>, numbered if taken."},
    )
    constraint: FormName = field(default="clip", metadata=CPOConstrainedConfig.__dataclass_fields__["constraint"].metadata)
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the training pairs."})
    price: bool = field(default=True, metadata=CPOConstrainedConfig.__dataclass_fields__["price"].metadata)
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})

    def __post_init__(self):
        self.chose_output_dir = self.output_dir is not None
        #: β and γ of a recipe that gives them for another reduction than the run's, and which were not taken.
        self.not_taken: dict[str, float] = {}
        super().__post_init__()

    def follows(self) -> str | None:
        names = [name for name in getattr(self, "not_taken", ()) if name in self.not_given]
        if not names:
            return super().follows()
        recipes = " and ".join(f"{name}={self.not_taken[name]:g}" for name in names)
        now = " and ".join(f"{name}={getattr(self, name):g}" for name in self.not_given)
        other = "sum" if self.logps_reduction == "mean" else "mean"
        return (
            f"{recipes} of the recipe are for logps_reduction={other!r}. Under {self.logps_reduction!r} the run has {now}; "
            "give --beta and --gamma for other values."
        )


@dataclass
class PolicyConfig(ModelConfig):
    """ModelConfig with a run's default model."""

    model_name_or_path: str | None = field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct",
        metadata={"help": "Hub name or folder, or 'demo' (the embedded SmolLM2-135M-Instruct)."},
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_peft:
                raise ValueError(f"{name} loads weights that cannot be trained: train an adapter on them, with --use_peft.")
