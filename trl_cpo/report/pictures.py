"""The report's pictures in order: what each shows, what a good one looks like, and what a run must have for it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from . import pair_pictures, paired, paired_pictures, price_pictures, seeds, slice_pictures, step_pictures
from .reading import LOG, PAIRS
from .run import Run
from .style import NARROW, WIDE, Shape, drawing, png


@dataclass(frozen=True)
class Kind:
    """A kind of picture: file name without suffix, title, captions, drawing function, and what a run must have for it."""

    name: str
    title: str
    shows: str
    good: str
    draw: Callable[[list[Run]], tuple]
    needs: str
    fewest_runs: int = 1


@dataclass(frozen=True)
class Drawn:
    """A drawing as a PNG, and its size on the page in CSS pixels."""

    png: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Picture:
    """A picture for a desk and for a phone, or, if neither is there, notes on why it was not drawn."""

    kind: Kind
    wide: Drawn | None = None
    narrow: Drawn | None = None
    notes: list[str] = field(default_factory=list)


KINDS = (
    Kind(
        "phase-portrait",
        "Phase portrait of the held-out pairs",
        "Each arrow is a held-out pair: across, the reference's gap; up, the policy's gap, from before training to after. "
        "The dashed diagonal is the reference itself; DPO's loss falls as an arrow rises above it. In the shaded region U "
        "a pair's gap exceeds the reference's, yet the policy still prefers the rejected answer.",
        "Arrows that start at the left, below 0, end above the dotted line γ, and few heads stay in the shade. Under "
        "plain DPO many arrows from far below end in the shade. Heads far to the right that fall towards 0 are a cost: "
        "look at those pairs.",
        pair_pictures.phase_portrait,
        needs="pairs",
    ),
    Kind(
        "over-steps",
        "Undesirable region, violations and preferences over steps",
        "The share of pairs in U, of pairs with a gap below γ, and of pairs whose chosen answer the policy prefers. Lines: "
        "the training pairs of each log, different pairs every time. Markers: the held-out pairs, with exact 95 % intervals "
        "where their number is known.",
        "“Prefers chosen” rises and violations fall, on held-out pairs too. U may rise at first, as gaps rise above the "
        "reference's, and should then fall. If U stays high while the loss falls, that is DPO's failure on misaligned "
        "pairs. Lines far better than the markers mean overfitting.",
        step_pictures.fractions_over_steps,
        needs="log",
    ),
    Kind(
        "seeds",
        "Seeds of one setting",
        "Runs whose settings are equal but for the seed, as one band: from the lowest to the highest of the seeds at each "
        "step that all of them were evaluated at, with their mean as the line. Held-out pairs only.",
        "Narrow bands, and bands of two settings that do not overlap: then the difference between the settings is larger "
        "than that between seeds. A band of two or three seeds is narrower than that of many.",
        seeds.seeds_as_bands,
        needs="seeds",
        fewest_runs=2,
    ),
    Kind(
        "gain-against-price",
        "Gain against price",
        "What training gained over what it cost: up, the share of held-out pairs whose chosen answer the policy prefers; "
        "across, the KL to the reference on the policy's own samples. A curve is a run, and its points are evaluations; "
        "training starts at a KL of 0.",
        "A curve that rises steeply and ends near the left: preference gained, little else changed. Of two runs equally "
        "high, prefer the one further left. A curve that goes on to the right without rising pays for nothing: an earlier "
        "evaluation was better. On general prompts nothing was meant to change, so the nearer to 0 the better.",
        price_pictures.gain_against_price,
        needs="price",
    ),
    Kind(
        "gap-distributions",
        "Distribution of the gap",
        "The distribution of the held-out pairs' gaps: the reference's in grey, after training in blue, and before "
        "training dashed if the policy did not start as the reference. Left of 0, the rejected answer is preferred.",
        "The blue outline has moved to the right of the dotted line γ. A long left tail that has not moved holds pairs "
        "that training left behind.",
        pair_pictures.gap_distributions,
        needs="pairs",
    ),
    Kind(
        "by-slice",
        "Fractions by slice and by length",
        "The share of held-out pairs whose chosen answer the policy prefers, and that in U, in parts of the pairs: by their "
        "length, by which answer is longer, and by their own columns. In brackets: the number of pairs; bars: exact 95 % "
        "intervals.",
        "All parts alike. If pairs with a longer chosen answer stay far behind, sums over tokens count length against them: "
        "look at the gap by means. A part far below the others was not learnt, or is too rare among the training pairs.",
        slice_pictures.fractions_by_slice,
        needs="slices",
    ),
    Kind(
        "sums-and-means",
        "The gap by sums and by means",
        "Each point is a held-out pair: across, its gap as sums over the answers' tokens; up, as means per token. Between "
        "the two lies the length of the answers. The run itself was trained on one of them.",
        "Most points at the upper right, and about the same share above 0 by both. Many pairs above 0 by one alone mean that "
        "the preference is one for length: a sum favours the shorter answer.",
        slice_pictures.sums_beside_means,
        needs="lengths",
    ),
    Kind(
        "gaps-together",
        "The gaps of all runs in the same axes",
        "For each gap, the share of held-out pairs below it, after training and for the reference. The height at 0 is "
        "the share of pairs whose rejected answer is preferred. The shade is the exact 95 % interval at each gap by itself.",
        "The lower and the further right a curve lies, the larger the gaps. A run that is lower at 0 but higher far to "
        "the right gets more pairs right, with smaller gaps.",
        pair_pictures.gaps_together,
        needs="pairs",
        fewest_runs=2,
    ),
    Kind(
        "pair-by-pair",
        "Two runs pair by pair",
        "Each point is a held-out pair that both runs were evaluated on: across, its gap in the first run; up, its gap in "
        "the run of the panel. Above the dashed diagonal the gap is larger in the run of the panel. The title says by how "
        "many percentage points its share that prefers chosen differs from the first run's, with the 95 % interval of a "
        "paired comparison (Tango's score interval): it counts only the pairs on which the two disagree.",
        "More points at the upper left (only the run of the panel prefers chosen) than at the lower right, and an interval "
        "that leaves out 0. It covers the choice of pairs, not that of the seed.",
        paired_pictures.pair_by_pair,
        needs="same pairs",
        fewest_runs=2,
    ),
    Kind(
        "loss-and-gap",
        "Loss and mean gap over steps",
        "What is minimised (loss) and what is wanted (gap). Each constraint measures the loss against its own target, so "
        "compare gaps between constraints, not losses. The dotted line is the reference's mean gap on the held-out "
        "pairs.",
        "The gap rises as the loss falls, and crosses 0. If the loss falls while the gap stays below 0, the policy beats "
        "the reference, and no more.",
        step_pictures.loss_and_gap,
        needs="log",
    ),
    Kind(
        "multiplier",
        "Multiplier, violation and slack",
        "λ, the current weight of the constraint; the mean violation; and the slack, ε minus the signal that drives λ, "
        "which is negative while the constraint does not hold.",
        "λ rises while the slack is negative and settles when the slack reaches 0 or more. If λ is at its cap and the "
        "slack still negative, the constraint cannot be met, or the cap is too low. If λ goes up and down, its step size "
        "is too large.",
        step_pictures.multiplier,
        needs="multiplier",
    ),
    Kind(
        "displacement-over-steps",
        "Displacement over steps",
        "How far training moved the mean log-probabilities of the chosen and of the rejected answers from the reference's.",
        "Rejected falls; chosen falls less or not at all. If both fall far, probability goes to answers in no pair, "
        "which nothing here measures: sample some and read them.",
        step_pictures.displacement_over_steps,
        needs="log",
    ),
    Kind(
        "displacement-of-pairs",
        "Displacement of each held-out pair",
        "How far the log-probabilities of each held-out pair moved: chosen across, rejected up. Below the dashed diagonal "
        "the gap exceeds the reference's; left of the vertical line the chosen answer became less likely.",
        "Points lie below the diagonal and near, or right of, the vertical line: the rejected answer fell and the chosen "
        "one did not. For points far down on the left, both answers fell.",
        pair_pictures.displacement_of_pairs,
        needs="pairs",
    ),
)


@dataclass(frozen=True)
class Need:
    """What a picture needs: finds the runs that have it; says why the others have not.

    A `quiet` picture is not mentioned if no run has what it needs: it does not apply.
    """

    able: Callable[[list[Run]], list[Run]]
    why: str
    quiet: bool = False


def _each(has: Callable[[Run], bool]) -> Callable[[list[Run]], list[Run]]:
    return lambda runs: [run for run in runs if has(run)]


def _has_log(run: Run) -> bool:
    return bool(run.training or run.evaluations)


def _beside_a_multiplier(runs: list[Run]) -> list[Run]:
    """Also runs without a multiplier, to compare their violations, if one run has one."""
    return _each(_has_log)(runs) if any(map(step_pictures.has_multiplier, runs)) else []


NEEDS = {
    "pairs": Need(_each(lambda run: run.held_out is not None), f"it needs {PAIRS} with pairs in it"),
    "log": Need(_each(_has_log), f"it needs {LOG} with the cpo/ metrics of steps in it"),
    "price": Need(
        _each(price_pictures.has_price),
        f"it needs evaluations after the start with eval_cpo/kl in {LOG}, and none measured the price",
    ),
    "slices": Need(
        _each(slice_pictures.has_slices),
        f"it needs tokens of the answers, or columns to slice by, in {PAIRS}, as new runs write",
    ),
    "lengths": Need(
        _each(slice_pictures.has_both_reductions),
        f"it needs tokens of the answers in {PAIRS}, as new runs write, of a run without ld_alpha",
    ),
    "seeds": Need(seeds.with_seeds, "no other run has the same settings and another seed", quiet=True),
    "same pairs": Need(
        paired.comparable, f"it needs two runs with the same pairs in {PAIRS}, scored alike by the reference, and none missing"
    ),
    "multiplier": Need(_beside_a_multiplier, f"it needs {LOG} with the cpo/ metrics of steps in it", quiet=True),
}


def draw(runs: list[Run]) -> list[Picture]:
    """Draws every kind of picture. If no run has what a picture needs, it is not drawn and its note says why.

    Leaves out pictures that do not apply: the multiplier if no run has one, runs together if there is only one run.
    """
    pictures = []
    for kind in KINDS:
        need = NEEDS[kind.needs]
        able = need.able(runs)
        if len(runs) < kind.fewest_runs or (need.quiet and not able):
            continue
        if len(able) < kind.fewest_runs:
            pictures.append(Picture(kind, notes=[f"Not drawn: {need.why}."]))
            continue
        (wide, notes), (narrow, _) = _drawn(kind, able, WIDE), _drawn(kind, able, NARROW)
        left_out = [run.letter for run in runs if run not in able]
        if left_out:
            notes = [f"Without {', '.join(left_out)}: {need.why}.", *notes]
        pictures.append(Picture(kind, wide, narrow, notes))
    return pictures


def _drawn(kind: Kind, runs: list[Run], shape: Shape) -> tuple[Drawn, list[str]]:
    with drawing(shape):
        figure, notes = kind.draw(runs)
        return Drawn(png(figure), round(figure.get_figwidth() * 96), round(figure.get_figheight() * 96)), notes
