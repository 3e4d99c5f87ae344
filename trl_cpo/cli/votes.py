"""`trl-cpo votes`: counts repeated judgements into pairs with a probability."""

import argparse
from pathlib import Path

from ..quoting import as_json, harmless
from .errors import UserError, user_errors

HELP = "count repeated judgements of the same answers into pairs with a probability"

_EPILOG = """\
  trl-cpo votes judgements.jsonl pairs.jsonl
  trl-cpo votes judgements.jsonl pairs.jsonl --counts votes_a votes_b --keep topic
  trl-cpo train --dataset_name pairs.jsonl --probability_column chosen_probs ...

Rows with the same prompt and the same two answers, in either order, are one pair. p is (k + 1/2)/(n + 1) for k of n votes
(Jeffreys' prior). Also told: pairs that people disagree on, and answers that beat each other in a circle."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("source", metavar="IN", help="hub name, .jsonl, .json or .parquet file, or folder")
    parser.add_argument("out", metavar="OUT", help="new .jsonl file for the pairs")
    parser.add_argument("--split", default="train", metavar="S", help="split of IN (default: train)")
    parser.add_argument(
        "--counts",
        nargs=2,
        metavar=("CHOSEN", "REJECTED"),
        help="columns with the votes for the chosen and for the rejected answer (default: a row is one vote)",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="columns that the pairs keep; the same in all judgements of a pair",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(options: argparse.Namespace) -> int:
    import json
    import sys
    from contextlib import redirect_stdout

    out = Path(options.out)
    if out.exists() or not out.parent.is_dir():
        why = "exists and is not overwritten" if out.exists() else "is in a folder that does not exist"
        raise UserError(f"{out} {why}.\nName a new file: trl-cpo votes IN OUT")
    with user_errors("All options: trl-cpo votes --help"), redirect_stdout(sys.stderr):
        from ..data.reading import read_pairs
        from ..data.votes import count_votes, in_words
        from ..files.atomic import replace_file

        needs = [*(options.counts or ()), *options.keep]
        pairs, refused = read_pairs(options.source, options.split, needs=needs)
        counted = count_votes(pairs, counts=tuple(options.counts) if options.counts else None, keep=options.keep)
        report = counted.report()
        if not counted.judged:
            raise UserError(f"{options.source} holds no judgement of two different answers, so no file was written.")
        lines = (json.dumps(each.pair(), ensure_ascii=False) for each in counted.judged)
        replace_file(out, "".join(f"{line}\n" for line in lines).encode())
        if refused is not None and refused.refused:
            reasons = ", ".join(f"{reason.value} {count}" for reason, count in refused.refused.items())
            print(f"{refused.total - refused.kept} of {refused.total} rows were refused: {reasons}", file=sys.stderr)
    print(as_json(report) if options.json else f"{harmless(in_words(report))}\nWritten to {out}.")
    return 0
