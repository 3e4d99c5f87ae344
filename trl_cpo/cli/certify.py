"""`trl-cpo certify`: certifies a run, or a model on held-out pairs, and checks certificates."""

import argparse
from typing import TYPE_CHECKING

from ..quoting import as_json, escaped
from .errors import UserError, user_errors

if TYPE_CHECKING:
    from pathlib import Path

HELP = "certify how many held-out pairs a run or model gets right, or check a certificate"

_EPILOG = """\
  trl-cpo certify outputs/run                                   at the run's own γ
  trl-cpo certify outputs/run --gamma 0 --at-least 0.5 --out c.json
  trl-cpo certify --check c.json --evidence outputs/run
  trl-cpo certify --model M --dataset D --gamma 1 --scores F    score pairs into the new folder F first

docs/theory.md says what is proven, and under which assumptions. Exit code 1: the certified share is 0 or below --at-least,
or a certificate does not follow from its evidence."""

_MAKES = ("kind", "gamma", "at_least", "by", "out")
_SCORES = (
    "ref_model",
    "split",
    "max_pairs",
    "logps_reduction",
    "max_length",
    "assistant_turns_only",
    "dtype",
    "batch_size",
    "scores",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG

    def add(name: str, **settings) -> None:
        # Also accepted with underscores, as in TRL's options.
        parser.add_argument(*dict.fromkeys((name, "--" + name[2:].replace("-", "_"))), **settings)

    parser.add_argument("run", nargs="?", metavar="RUN", help="folder of a run: pairs.json and metrics.json")
    add("--kind", metavar="KIND", help="kind of certificate: held_out (the only one), from the count of held-out pairs")
    add("--gamma", type=float, metavar="G", help="gap to certify, in nats (default: the run's gamma)")
    add("--at-least", type=float, metavar="SHARE", help="share of pairs that must be certified, 0 to 1 (default: 0)")
    add("--by", metavar="COLUMN", help="one certificate for each value of this column, all true together with 95 %% confidence")
    add("--out", metavar="FILE", help="write the certificate to this new file, as JSON")
    add("--check", metavar="FILE", help="recompute this certificate and list the fields that differ")
    add("--evidence", metavar="RUN", help="with --check: recompute it from this run's files, not from its own numbers")
    add("--model", metavar="M", help="score this model: hub name, folder (also an adapter's) or 'demo'")
    add(
        "--dataset",
        metavar="D",
        help="with --model: pairs it was not trained on; hub name, file, folder, 'demo' or 'demo-answers'",
    )
    add("--ref-model", metavar="R", help="with --model: its reference, scored too")
    add(
        "--scores",
        metavar="FOLDER",
        help="with --model: new or empty folder for the scored pairs, the certificate's evidence",
    )
    add("--split", metavar="S", help="with --model: the dataset's split (default: test)")
    add("--max-pairs", type=int, metavar="N", help="with --model: draw N pairs at random")
    add(
        "--logps-reduction",
        choices=["sum", "mean"],
        help="with --model: sum (nats per response, the default) or mean (per token)",
    )
    add(
        "--max-length",
        type=int,
        metavar="N",
        help="with --model: longest sequence, as in training (default: 1024); 0: no limit",
    )
    add(
        "--assistant-turns-only",
        action="store_true",
        default=None,
        help="with --model: score the assistant's turns alone, as in training",
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        help="with --model: type of the weights (default: float32)",
    )
    add("--batch-size", type=int, metavar="N", help="with --model: pairs scored at once (default: 8)")
    add("--json", action="store_true", help="print the certificate, or the differences, as JSON")


def run(options: argparse.Namespace) -> int:
    _refuse_mixtures(options)
    if options.check is not None:
        return _check(options)
    return _certify(options)


def _refuse_mixtures(options: argparse.Namespace) -> None:
    def given(*names):
        return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) is not None]

    sources = ["RUN"] * (options.run is not None) + given("model", "check")
    faults = []
    if len(sources) != 1:
        faults.append(f"give exactly one of RUN, --model and --check; got {' and '.join(sources) or 'none of them'}")
    if options.check is not None:
        faults += [f"{name} is for making a certificate, not for --check" for name in given(*_MAKES)]
    elif options.evidence is not None:
        faults.append("--evidence needs --check")
    if options.model is None:
        faults += [f"{name} needs --model" for name in given("dataset", *_SCORES)]
    else:
        faults += [f"--model needs --{name}" for name in ("dataset", "gamma", "scores") if getattr(options, name) is None]
        sizes = {"max_pairs": 1, "batch_size": 1, "max_length": 0}
        got = {name: getattr(options, name) for name in sizes if getattr(options, name) is not None}
        faults += [
            f"--{name.replace('_', '-')} must be >= {sizes[name]}; got {value}"
            for name, value in got.items()
            if value < sizes[name]
        ]
    if faults:
        raise UserError("; ".join(faults) + ".\nAll options: trl-cpo certify --help")


def _certify(options: argparse.Namespace) -> int:
    import json
    import sys
    from contextlib import redirect_stdout
    from pathlib import Path

    out = None if options.out is None else Path(options.out)
    if out is not None and (out.exists() or not out.parent.is_dir()):
        why = "exists and is not overwritten" if out.exists() else "is in a folder that does not exist"
        raise UserError(f"{out} {why}.\nWrite it elsewhere: trl-cpo certify … --out FILE")
    folder = options.run
    # Some libraries print to stdout, which is for the answer alone.
    with user_errors("All options: trl-cpo certify --help"), redirect_stdout(sys.stderr):
        from ..certificates import certify_parts, certify_run, check_kind

        kind = options.kind or "held_out"
        check_kind(kind)
        if options.model is not None:
            from ..certificates.from_model import score_to_folder

            folder = options.scores
            score_to_folder(
                folder,
                model=options.model,
                dataset=options.dataset,
                gamma=options.gamma,
                ref_model=options.ref_model,
                split=options.split or "test",
                max_pairs=options.max_pairs,
                reduction=options.logps_reduction or "sum",
                max_length=1024 if options.max_length is None else options.max_length or None,
                dtype=options.dtype or "float32",
                batch_size=options.batch_size or 8,
                assistant_turns_only=bool(options.assistant_turns_only),
            )
        asked = {"kind": kind, "gamma": options.gamma, "at_least": options.at_least or 0.0}
        if options.by is None:
            documents = [certify_run(folder, **asked)]
        else:
            documents = certify_parts(folder, options.by, **asked)
    # One document by itself is no list.
    whole = documents[0] if options.by is None else documents
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
    if out is not None:
        _write_new(out, text + "\n")
    words = "\n\n".join(_in_words(document, folder, options.out) for document in documents)
    print(as_json(whole) if options.json else words)
    return 0 if all(document["holds"] for document in documents) else 1


def _write_new(out: "Path", text: str) -> None:
    from contextlib import suppress

    begun = False
    try:
        with out.open("x", encoding="utf-8") as stream:
            begun = True
            stream.write(text)
    except OSError as error:
        if begun:
            with suppress(OSError):
                out.unlink()
        raise UserError(
            f"{out} cannot be written: {error.strerror}. Nothing is left of it.\n"
            "Write it elsewhere: trl-cpo certify … --out FILE"
        ) from error


def _in_words(document: dict, folder: str, out: str | None) -> str:
    share, least = document["certified_share"], document["asked"]["at_least"]
    verdict = "holds" if document["holds"] else "does NOT hold"
    asked = f", asked for at least {least:.4g}" if least else ""
    lines = [
        escaped(document["statement"]),
        "",
        f"{verdict}: certified share {share:.4f}{asked}, slack {document['slack']:+.4f}",
        "",
    ]
    lines += ["Assumptions:"] + [f"- {assumption}" for assumption in document["assumptions"]]
    lines += ["", f"evidence     {folder}: {', '.join(document['evidence']['files'])}"]
    if out is not None:
        lines += [f"certificate  {out}", f"check it     trl-cpo certify --check {out} --evidence {folder}"]
    return "\n".join(lines)


def _check(options: argparse.Namespace) -> int:
    with user_errors("All options: trl-cpo certify --help"):
        from ..certificates import check, read_json

        found = read_json(options.check)
        several = isinstance(found, list) and len(found) > 0
        documents = found if several else [found]
        differences = []
        for number, document in enumerate(documents):
            place = f"certificate {number}: " if several else ""
            differences += [f"{place}{line}" for line in check(document, options.evidence)]
    holds = not differences and all(document["holds"] is True for document in documents)
    if options.json:
        print(as_json({"true": not differences, "holds": holds, "differences": differences}))
    elif differences:
        print(f"{options.check} does not follow from its evidence:\n" + "\n".join(f"- {line}" for line in differences))
    else:
        source = (
            f"the files in {options.evidence}"
            if options.evidence
            else "its own numbers (to check the run's files too: --evidence RUN)"
        )
        said = "\n".join(escaped(document["statement"]) for document in documents)
        print(f"{said}\n\nIt {'holds' if holds else 'does NOT hold'}, and follows from {source}.")
    return 0 if holds else 1
