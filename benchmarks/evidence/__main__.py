"""
Runs the experiments of docs/evidence.md and prints their tables.

    python -m benchmarks.evidence decisions --text PATH            # tuning: every arm, one seed
    python -m benchmarks.evidence decisions --text PATH --final    # each method's best arm by the validation part, more seeds
    python -m benchmarks.evidence sampled --text PATH --final
    python -m benchmarks.evidence tables --into docs/evidence.md

PATH holds pairs as HH-RLHF writes them, for instance harmless-base's test split. Models are kept in --work, one line a run in
--records; a run that is recorded is not run again. `--small` tries all of it in two minutes with the package's own pairs.
"""

import argparse
from pathlib import Path

from . import figure, tables
from .bench import EXPERIMENTS, FULL, NEED_LARGER, SMALL, VARIANTS, Bench
from .runs import Records, done

RECORDS = Path(__file__).parent / "records"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name, arms in EXPERIMENTS.items():
        run = verbs.add_parser(name, help=f"run the experiment {name!r}")
        run.add_argument("--text", default=None, help="pairs to take texts from: file, folder or hub name")
        run.add_argument("--work", type=Path, default=Path("evidence-work"), help="folder for models and sampled answers")
        run.add_argument("--records", type=Path, default=RECORDS, help="folder of the records to add to")
        run.add_argument("--variant", default=VARIANTS[name][0], choices=VARIANTS[name])
        run.add_argument(
            "--arms", nargs="+", choices=sorted(arms), help="default: all, or with --final the best of each method"
        )
        run.add_argument("--seeds", type=int, nargs="+", help="default: 0, which tunes; with --final 1 to 5; of real 1 to 3")
        if name in tables.LEVELS and name != "real":
            run.add_argument("--final", action="store_true", help="the best arm of each method by the validation part")
            run.add_argument(
                "--methods", nargs="+", help="with --final: these alone, in this order (a method is an arm less β)"
            )
        run.add_argument("--processes", type=int, default=1, help="runs side by side, each on one thread; default: 1")
        if name in NEED_LARGER:
            run.add_argument("--model", help="folder of SmolLM2-135M-Instruct; default: the demo's")
        run.add_argument("--small", action="store_true", help="try the programs; the numbers mean nothing")
    table = verbs.add_parser("tables", help="print every table, or write those of a page and the figure beside it")
    table.add_argument("--records", type=Path, default=RECORDS)
    table.add_argument("--into", type=Path, help="page to fill")
    options = parser.parse_args(arguments)
    if options.verb == "tables":
        if options.into is None:
            print(tables.everything(options.records))
        else:
            text = options.into.read_text(encoding="utf-8")
            options.into.write_text(tables.filled(text, options.records), encoding="utf-8")
            options.into.with_suffix(".svg").write_text(figure.figure(options.records), encoding="utf-8")
        return
    if options.text is None and not options.small:
        parser.error("--text is missing: pairs as HH-RLHF writes them, or --small to try the programs with the package's own.")
    made = (options.text or "demo-answers", options.work, SMALL if options.small else FULL)
    bench = Bench(*made, larger_model=getattr(options, "model", None), trial=options.small)
    records = Records(options.records / f"{options.verb}.jsonl")
    arms, tuned = options.arms or list(EXPERIMENTS[options.verb]), getattr(options, "final", False)
    if tuned and not options.arms:
        best = tables.best_arms(records.runs, options.verb, options.variant)
        if unknown := set(options.methods or ()) - set(best):
            parser.error(
                f"--methods {' '.join(map(repr, sorted(unknown)))}: not among those tuned, {', '.join(map(repr, best))}."
            )
        arms = [best[method] for method in options.methods or best]
    jobs = []
    for arm in dict.fromkeys(("start", *arms)):
        for seed in options.seeds or ([1, 2, 3] if options.verb == "real" else [1, 2, 3, 4, 5] if tuned else [0]):
            job = {"experiment": options.verb, "variant": options.variant, "arm": arm, "seed": seed}
            if not records.has(job):
                jobs.append(job)
    # The starts first: they make the references.
    for run in done(bench, sorted(jobs, key=lambda job: job["arm"] != "start"), options.processes):
        records.add(run)
        print(tables.told(run), flush=True)


if __name__ == "__main__":
    main()
