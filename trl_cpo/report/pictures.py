"""The report's pictures in their order: what each shows, what a good one looks like, and which runs it can be made of."""

from collections.abc import Callable
from dataclasses import dataclass, field

from . import pair_pictures, step_pictures
from .reading import LOG, PAIRS
from .run import Run
from .style import WIDTH, drawing, png


@dataclass(frozen=True)
class Kind:
    """A kind of picture: file name without its ending, title, words, what draws it, and what a run must have for it."""

    name: str
    title: str
    shows: str
    good: str
    draw: Callable[[list[Run]], tuple]
    needs: str
    fewest_runs: int = 1


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn, or (`png` is None) why it was not. Sizes are CSS pixels on the page."""

    kind: Kind
    png: bytes | None
    width: int = 0
    height: int = 0
    notes: list[str] = field(default_factory=list)


KINDS = (
    Kind(
        "phase-portrait",
        "Phase portrait of the held-out pairs",
        "A held-out pair is an arrow from its gap before training to its gap after (up), at the place of the "
        "reference's gap (across). The dashed diagonal is the reference itself; DPO's loss falls wherever an arrow "
        "rises from it. In the shaded region U the pair beats the reference and the policy still prefers the rejected "
        "answer.",
        "Arrows that start on the left, below 0, end above the dotted line γ, and few heads stay in the shade. Under "
        "plain DPO many arrows from far below end inside it. Heads far to the right that fall towards 0 would be a "
        "price to look at.",
        pair_pictures.phase_portrait,
        needs="pairs",
    ),
    Kind(
        "over-steps",
        "Undesirable region, violations and preferences over steps",
        "The share of pairs in U, with a gap below γ, and preferred by the policy itself; lines are the training "
        "pairs of each log, other pairs every time, and markers are the held-out pairs.",
        "“Prefers chosen” rises and violations fall, on held-out pairs too. U may rise at first, as pairs leave the "
        "reference upwards, and should fall again; a U that stays high while the loss falls is DPO's failure on "
        "misaligned pairs. Lines far better than the markers mean overfitting.",
        step_pictures.fractions_over_steps,
        needs="log",
    ),
    Kind(
        "gap-distributions",
        "Distribution of the gap",
        "How the gaps of the held-out pairs are spread: the reference's in grey, after training in blue (before "
        "training dashed, where the policy did not start as the reference). Mass left of 0 prefers the rejected "
        "answer.",
        "The blue outline has moved to the right of the dotted line γ. A long left tail that did not move holds the "
        "pairs that training left behind.",
        pair_pictures.gap_distributions,
        needs="pairs",
    ),
    Kind(
        "gaps-together",
        "The gaps of all runs in the same axes",
        "For every gap, the share of held-out pairs that lie below it, after training and for the reference. The "
        "height at 0 is the share that prefers the rejected answer.",
        "The lower and the further right a curve runs, the larger the gaps. A run that is lower at 0 and higher far "
        "to the right gets more pairs right by smaller gaps.",
        pair_pictures.gaps_together,
        needs="pairs",
        fewest_runs=2,
    ),
    Kind(
        "loss-and-gap",
        "Loss and mean gap over steps",
        "What is minimised, beside what is wanted. The loss is measured against each constraint's own target, so "
        "losses of different constraints do not compare; gaps do. The dotted level is the reference's mean gap on the "
        "held-out pairs.",
        "The gap rises with the falling loss and crosses 0. A loss that falls while the gap stays below 0 says that "
        "the policy beats the reference, and no more.",
        step_pictures.loss_and_gap,
        needs="log",
    ),
    Kind(
        "multiplier",
        "Multiplier, violation and slack",
        "λ, the weight that the constraint has now; the mean violation that drives it; and the slack, ε minus the "
        "violation of the signal, which is negative as long as the constraint does not hold.",
        "λ rises while the slack is negative and settles as the slack comes to 0 or above. λ at its cap with the "
        "slack still negative: the constraint cannot be met, or the cap is too low. λ going up and down: its step "
        "size is too large.",
        step_pictures.multiplier,
        needs="multiplier",
    ),
    Kind(
        "displacement-over-steps",
        "Displacement over steps",
        "How far training moved the log-probability of the chosen and of the rejected answers from the reference's, "
        "on average.",
        "Rejected falls, chosen falls less or not at all. Both falling far means that probability goes to answers "
        "that are in no pair, which no number here judges: read some.",
        step_pictures.displacement_over_steps,
        needs="log",
    ),
    Kind(
        "displacement-of-pairs",
        "Displacement of each held-out pair",
        "Each held-out pair by how far its chosen (across) and rejected (up) answers moved. Below the dashed diagonal "
        "the gap grew beyond the reference's; left of the upright line the chosen answer became less likely.",
        "Points below the diagonal and near, or right of, the upright line: the rejected answer fell and the chosen "
        "one stayed. Points far down on the left fell on both sides.",
        pair_pictures.displacement_of_pairs,
        needs="pairs",
    ),
)

_HAS = {
    "pairs": (lambda run: run.held_out is not None, f"it needs {PAIRS} with pairs in it"),
    "log": (lambda run: bool(run.training or run.evaluations), f"it needs {LOG} with the cpo/ metrics of steps in it"),
    "multiplier": (step_pictures.has_multiplier, "no run logged a multiplier"),
}


def draw(runs: list[Run]) -> list[Picture]:
    """Every picture that the runs allow; one that none of them allows has no PNG and says why.

    A picture that does not apply (the multiplier where no run has one, runs together where there is one) is left out.
    """
    pictures = []
    for kind in KINDS:
        has, why = _HAS[kind.needs]
        able = [run for run in runs if has(run)]
        if kind.needs == "multiplier" and able:
            able = [run for run in runs if _HAS["log"][0](run)]  # the others' violations stand beside it
        elif kind.needs == "multiplier" or len(runs) < kind.fewest_runs:
            continue
        if len(able) < kind.fewest_runs:
            pictures.append(Picture(kind, None, notes=[f"Not drawn: {why}."]))
            continue
        with drawing():
            figure, notes = kind.draw(able)
            data = png(figure)
        left_out = [run.letter for run in runs if run not in able]
        if left_out:
            notes = [f"Without {', '.join(left_out)}: {why}.", *notes]
        pictures.append(Picture(kind, data, round(WIDTH * 96), round(figure.get_figheight() * 96), notes))
    return pictures
