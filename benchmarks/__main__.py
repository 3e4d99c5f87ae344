"""
Runs benchmark cases and writes JSON and a table.

    python -m benchmarks --pairs path/to/hh-rlhf-harmless-base-test.jsonl.gz            # all cases
    python -m benchmarks --cases packed-lora-8 packed-full-8 --no-memory                # some, times only

On a GPU: `python -m benchmarks.gpu`.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch


def row(name: str, record: dict, target: str) -> str:
    """One row of the table: a case, its record and its target, in Markdown."""
    if "seconds_per_pair" in record:
        shown = ", ".join(f"{n}: {1000 * v['train_s']:.1f} ms" for n, v in record["seconds_per_pair"].items())
        shown += f" (+ {max(v['first_step_s'] for v in record['seconds_per_pair'].values()):.2f} s for the first step)"
        return f"| {name} | {shown} | largest/smallest {record['largest_over_smallest']:.2f} | | {target} |"
    ratio = f"{record['ratio']:.2f}×"
    if "lowest" in record:
        ratio += f" ({record['lowest']:.2f} to {record['highest']:.2f}, n={record['batches']}; CPU {record['cpu_ratio']:.2f}×)"
    if "share_of_limit" in record:
        ratio += f", {100 * record['share_of_limit']:.0f} % of {record['limit']:.2f}×"
    memory = ""
    if "memory_ratio" in record:
        memory = f"{record['memory_ratio']:.2f} ({record['baseline_mib']:.0f} → {record['ours_mib']:.0f} MiB)"
    return f"| {name} | {record['baseline_s']:.2f} s → {record['ours_s']:.2f} s | {ratio} | {memory} | {target} |"


def main() -> None:
    from .cases import cases

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=None, help="model folder; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--pairs", default="demo-answers", help="pairs: file, folder, hub name, 'demo' or 'demo-answers'")
    parser.add_argument("--cases", nargs="*", default=None, help="cases to run; default: all")
    parser.add_argument("--batches", type=int, default=3, help="batches per arm")
    parser.add_argument("--max_length", type=int, default=512, help="longest sequence, tokens")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--no-memory", action="store_true", help="measure times only")
    parser.add_argument("--out", default="benchmarks.json", help="JSON file to add to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.model is None:
        from trl_cpo.data.demo.model import demo_model_folder

        options.model = str(demo_model_folder())
    table = cases(options.model, options.pairs, options.batches, options.max_length)
    names = options.cases or list(table)
    unknown = [name for name in names if name not in table]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; the cases are {', '.join(table)}")
    out = Path(options.out)
    records = json.loads(out.read_text()) if out.exists() else []
    about = {
        "when": time.strftime("%Y-%m-%d"),
        "threads": options.threads,
        "pairs": Path(options.pairs).name,
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("trl-cpo", "trl", "transformers", "torch")},
    }
    print("| case | median step, TRL → ours | times faster (range) | peak memory over the model | target |")
    print("|---|---|---|---|---|")
    for name in names:
        run, setting, target = table[name]
        record = run(setting, not options.no_memory)
        setting_dict = {**vars(setting), "model": Path(setting.model).name, "pairs": Path(setting.pairs).name}
        records.append({"case": name, **about, "setting": setting_dict, "target": target, **record})
        out.write_text(json.dumps(records, indent=1) + "\n")
        print(row(name, record, target), flush=True)


if __name__ == "__main__":
    main()
