"""`trl-cpo stress RUN`: whether what a run gained holds under prompts that look different."""

import argparse

from ..quoting import as_json
from .errors import UserError, nearest, user_errors
from .imports import fast_imports

HELP = "score a run's held-out pairs again under changed prompts: does what it gained hold?"

_EPILOG = """\
  trl-cpo stress outputs/run
  trl-cpo stress outputs/run --only typos --typos 0.2
  trl-cpo stress outputs/run --system "You are a terse assistant." --max-pairs 200

Shifts: system-prompt, no-template, typos, longer-dialogue; as-it-was is always scored. The answers stay the same. The result
goes to stress.json in the run's folder, and trl-cpo report shows it. docs/stress.md says how to read it.

exit codes: 0 done; 1 done, but the run's own numbers did not come again; 2 cannot be scored"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG

    def add(name: str, **settings) -> None:
        # Also accepted with underscores, as in TRL's options.
        parser.add_argument(*dict.fromkeys((name, "--" + name[2:].replace("-", "_"))), **settings)

    parser.add_argument("run", metavar="RUN", help="folder of a run: model, metrics.json and pairs.json")
    add("--only", nargs="+", default=[], metavar="SHIFT", help="only these shifts (default: all)")
    add("--system", metavar="TEXT", help="system message to try (default: three ordinary ones, in turn)")
    add("--typos", type=float, default=0.05, metavar="SHARE", help="share of words that get a typo (default: 0.05)")
    add("--seed", type=int, default=0, help="seed of the typos (default: 0)")
    add("--max-pairs", type=int, metavar="N", help="draw N of the held-out pairs at random")
    add("--batch-size", type=int, default=8, metavar="N", help="pairs scored at once (default: 8)")
    add("--dataset", metavar="D", help="where the run's pairs are now, if elsewhere")
    add("--ref-model", metavar="R", help="where the run's reference is now, if elsewhere")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    import sys
    from contextlib import redirect_stdout

    from ..quoting import harmless
    from ..stress.shifts import SHIFTS, SYSTEMS, Options

    names = [shift.name for shift in SHIFTS]
    only = [name.replace("-", " ").replace("_", " ") for name in options.only]
    _refuse_mistakes(options, only, names)
    # Some libraries print to stdout, which is for the answer alone.
    with user_errors("All options: trl-cpo stress --help"), redirect_stdout(sys.stderr):
        from ..stress.recorded import read_recorded

        recorded = read_recorded(options.run)  # before TRL is imported, which takes seconds
        with fast_imports():
            from accelerate import PartialState
            from trl import DPOTrainer  # noqa: F401 - imported late by those that use it

            from ..files.atomic import strict, write_json
            from ..stress.document import document, stress_file
            from ..stress.measure import measure
            from ..stress.text import render

        file, speaks = stress_file(recorded.folder), PartialState().is_main_process
        systems = SYSTEMS if options.system is None else (options.system,)
        asked = Options(systems, options.typos, options.seed)
        found = measure(
            recorded,
            asked,
            only=only,
            dataset=options.dataset,
            ref_model=options.ref_model,
            max_pairs=options.max_pairs,
            batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
            say=lambda line: print(harmless(line), file=sys.stderr, flush=True) if speaks else None,
        )
        whole = strict(document(recorded, found, asked))
        if speaks:
            write_json(file, whole)
    if speaks:
        print(as_json(whole) if options.json else f"{render(whole)}\n\nWritten to {file}.")
    return 0 if found.reproduced else 1


def _refuse_mistakes(options: argparse.Namespace, only: list[str], names: list[str]) -> None:
    faults = [
        f"--only {given}: there is no such shift; there are {', '.join(name.replace(' ', '-') for name in names)}."
        + nearest(given, [name.replace(" ", "-") for name in names])
        for given, name in zip(options.only, only, strict=True)
        if name not in names
    ]
    if not 0 < options.typos <= 1:
        faults.append(f"--typos must be above 0 and at most 1; got {options.typos:g}.")
    if options.system is not None and not options.system.strip():
        faults.append("--system must be a text; got an empty one.")
    for name in ("max_pairs", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            faults.append(f"--{name.replace('_', '-')} must be >= 1; got {value}.")
    if faults:
        raise UserError("\n".join(faults) + "\nAll options: trl-cpo stress --help")
