"""`trl-cpo audit`: shows how a reference ranks your pairs, before you spend a GPU-day."""

import argparse
import json
from pathlib import Path

from ..quoting import as_json, harmless
from .errors import UserError, user_errors
from .imports import fast_imports

HELP = "look before you train: where the reference is misaligned on your pairs, and what the model sees"

_EPILOG = """\
  trl-cpo audit --model demo --dataset demo                    minutes on a CPU, no hub
  trl-cpo audit --model M --dataset D --max-pairs 500          500 pairs drawn at random
  trl-cpo audit --model M --dataset D --preflight-only         tokens only, no model is loaded: seconds
  trl-cpo audit --model outputs/run --ref-model M --dataset D  a trained policy (or adapter) against its reference

docs/audit.md explains how to read the result, the formula of each number, and the limits. Scores are cached: later audits
reuse them, and so does training with --precompute_ref_log_probs under a constraint.

exit codes: 0 no fault found; 1 a fault found in the pairs, the template or the tokens (FAULT in the text, "fault": true in
the document), measured all the same; 2 cannot be audited"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG

    def add(name: str, **settings) -> None:
        # Also accepted with underscores, as in TRL's options.
        parser.add_argument(*dict.fromkeys((name, "--" + name[2:].replace("-", "_"))), **settings)

    add(
        "--model",
        required=True,
        metavar="M",
        help="hub name, folder (also an adapter's) or 'demo'; the reference, unless --ref-model is given",
    )
    add(
        "--dataset",
        required=True,
        metavar="D",
        help="hub name, .jsonl[.gz], .json or .parquet file, folder, 'demo' or 'demo-answers'",
    )
    add("--ref-model", metavar="R", help="use R as the reference; M is then the policy")
    add("--split", nargs="+", default=["train"], metavar="S", help="splits, audited separately (default: train)")
    add("--dataset-config", metavar="NAME", help="configuration of a hub dataset")
    add("--dataset-data-dir", metavar="DIR", help="folder inside the dataset, such as harmless-base in HH-RLHF")
    add("--slice", nargs="+", action="extend", default=[], metavar="COLUMN", help="also report by the values of these columns")
    add("--by", metavar="COLUMN", help="also show how each group starts; the group_column of training")
    add(
        "--score-columns",
        nargs=2,
        metavar=("CHOSEN", "REJECTED"),
        help="columns of reward scores (default: score_chosen score_rejected, if present)",
    )
    add("--max-pairs", type=int, metavar="N", help="draw N pairs at random")
    add("--seed", type=int, default=0, help="seed of that draw (default: 0)")
    add("--beta", type=float, help="DPO's beta (default: 0.1; 2.5 for means)")
    add("--gamma", type=float, help="target gap of clip, in nats (default: 1.0; 0.05 for means)")
    add(
        "--logps-reduction",
        choices=["sum", "mean"],
        default="sum",
        help="sum (nats per response, the default) or mean (per token)",
    )
    add(
        "--max-length",
        type=int,
        default=1024,
        metavar="N",
        help="longest sequence, as in training (default: 1024); 0: no limit",
    )
    add(
        "--truncation-mode",
        choices=["keep_start", "keep_end"],
        default="keep_start",
        help="as in training (default: keep_start)",
    )
    add("--assistant-turns-only", action="store_true", help="score the assistant's turns alone, as in training")
    add(
        "--dtype",
        choices=["float32", "bfloat16", "float16", "auto"],
        default="float32",
        help="type of the weights (default: float32)",
    )
    add("--batch-size", type=int, default=8, metavar="N", help="pairs scored at once (default: 8)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--worst", type=int, default=3, metavar="N", help="worst pairs to quote (default: 3; 0: none)")
    add("--preflight-only", action="store_true", help="check the tokens only; load no model")
    add("--pairs", metavar="FILE", help="also write each scored pair to this new file, a line of JSON each")
    add("--json", action="store_true", help="print one JSON document")


def run(options: argparse.Namespace) -> int:
    import sys
    from contextlib import redirect_stdout

    faults = _faults(options)
    out = None if options.pairs is None else Path(options.pairs).expanduser()
    if out is not None and options.preflight_only:
        faults.append("--pairs writes scores, and --preflight-only scores nothing. Leave one of them out.")
    elif out is not None and (out.exists() or not out.parent.is_dir()):
        why = "exists and is not overwritten" if out.exists() else "is in a folder that does not exist"
        faults.append(f"--pairs {out} {why}.")
    if faults:
        raise UserError("\n".join(faults) + "\nAll options: trl-cpo audit --help")
    # Some libraries print to stdout, which is for the answer alone.
    with user_errors("All options: trl-cpo audit --help"), redirect_stdout(sys.stderr):
        # No token needs bitsandbytes, which is a seventh of the time.
        with fast_imports(absent=["bitsandbytes"] if options.preflight_only else []):
            from accelerate import PartialState
            from transformers import AutoProcessor  # noqa: F401 - imported late by those that use it
            from trl import DPOTrainer  # noqa: F401 - the same

            from ..audit.auditing import audit
            from ..audit.text import render
            from ..files.atomic import replace_file

        speaks = PartialState().is_main_process
        lines: list[str] = []
        document = audit(
            _request(options),
            lambda line: print(harmless(line), file=sys.stderr, flush=True) if speaks else None,
            lambda rows: lines.extend(json.dumps(row) for row in rows) if out is not None else None,
        )
        if out is not None and speaks:
            replace_file(out, "".join(f"{line}\n" for line in lines).encode())
        faulty = any(found["fault"] for one in document["sets"] for found in one["preflight"]["findings"])
        answer = as_json(document) if options.json else render(document)
    if speaks:
        print(answer)
    return 1 if faulty else 0


def _faults(options: argparse.Namespace) -> list[str]:
    from math import isfinite

    above = {"beta": 0.0, "max_pairs": 0, "batch_size": 0}
    least = {"gamma": 0.0, "max_length": 0, "worst": 0, "seed": 0}
    faults = []
    for name, bound in {**above, **least}.items():
        value = getattr(options, name)
        if value is not None and not (isfinite(value) and (value >= bound if name in least else value > bound)):
            sign = ">=" if name in least else ">"
            faults.append(f"--{name.replace('_', '-')} must be {sign} {bound:g}; got {value:g}.")
    return faults


def _request(options: argparse.Namespace):
    from ..audit.auditing import AuditRequest
    from ..audit.measures import Settings
    from ..scoring.scorer import Scorer

    by_means = options.logps_reduction == "mean"
    # Means: the paper's values. Sums: TRL's β and the README's γ.
    beta, gamma = (2.5, 0.05) if by_means else (0.1, 1.0)
    return AuditRequest(
        model=options.model,
        dataset=options.dataset,
        ref_model=options.ref_model,
        splits=tuple(dict.fromkeys(options.split)),
        dataset_config=options.dataset_config,
        dataset_data_dir=options.dataset_data_dir,
        slices=tuple(dict.fromkeys(options.slice)),
        by=options.by,
        score_columns=tuple(options.score_columns) if options.score_columns else None,
        settings=Settings(
            beta=beta if options.beta is None else options.beta,
            gamma=gamma if options.gamma is None else options.gamma,
            reduction=options.logps_reduction,
        ),
        max_pairs=options.max_pairs,
        seed=options.seed,
        worst=options.worst,
        preflight_only=options.preflight_only,
        scorer=Scorer(
            max_length=options.max_length or None,
            truncation_mode=options.truncation_mode,
            dtype=options.dtype,
            batch_size=options.batch_size,
            trust_remote_code=options.trust_remote_code,
            assistant_turns_only=options.assistant_turns_only,
        ),
    )
