"""Run everything that needs a GPU in one sitting: `python -m melrt_benchmarks.sitting --out FOLDER --budget 600`."""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from melrt_benchmarks.sitting.html import page
from melrt_benchmarks.sitting.runner import Result, Sitting, joined_logs, run_sitting, write_whole
from melrt_benchmarks.sitting.steps import ROOT, STEPS, Step

DEMO_VOICE = ROOT / "export/melrt_export/demo_voice"
TERMINATED = 128 + signal.SIGTERM


def main() -> int:
    """Run the sitting; return 0, 1 if a step failed or timed out, or 2 for wrong arguments."""
    parser = _parser()
    options = parser.parse_args()
    if options.list:
        for step in STEPS:
            print(f"{step.name:24}{step.limit:5} s  {step.title}")
        return 0
    wanted = options.only.split(",") if options.only else [step.name for step in STEPS]
    unknown = {*wanted, *options.again} - {step.name for step in STEPS}
    if unknown:
        parser.error(f"no step has the name {', '.join(sorted(unknown))}; --list shows the names.")
    work = options.work or options.out.with_name(options.out.name + ".work")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # as an exception, so that the running step is killed, too
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would the steps
    sitting = Sitting(options.out.resolve(), work.resolve(), options.voice.resolve(), options.budget, tuple(options.again))
    return _run(sitting, [step for step in STEPS if step.name in wanted])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="melrt_benchmarks.sitting", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-sitting"), help="Folder for sitting.json, sitting.html and sitting.log.")
    parser.add_argument("--work", type=Path, help="Folder for everything else; a later run resumes from it. Default: OUT.work.")
    parser.add_argument("--voice", type=Path, default=DEMO_VOICE, metavar="CHECKPOINT", help="Voice to measure. Default: the demo voice.")
    parser.add_argument("--budget", type=float, default=3600.0, metavar="SECONDS", help="A step whose limit does not fit is not begun.")
    parser.add_argument("--only", default="", metavar="NAMES", help="Run only these steps, comma-separated.")
    parser.add_argument("--again", action="append", default=[], metavar="NAME", help="Run this step although it has a result.")
    parser.add_argument("--list", action="store_true", help="Print the steps and their limits, and end.")
    return parser


def _run(sitting: Sitting, steps: list[Step]) -> int:
    sitting.out.mkdir(parents=True, exist_ok=True)
    began = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    done: list[Result] = []

    def show(result: Result) -> None:
        done.append(result)
        reason = f": {result.reason}" if result.reason else ""
        print(f"step {len(done)} of {len(steps)}: {result.name} {result.outcome} in {result.seconds:.1f} s{reason}", flush=True)
        _write(sitting, done, began)

    run_sitting(sitting, steps, show)
    print(f"Wrote {sitting.out / 'sitting.html'}, sitting.json and sitting.log. Run it again with --work {sitting.work} to resume.")
    return 1 if any(result.outcome in ("failed", "timed out") for result in done) else 0


def _write(sitting: Sitting, results: list[Result], began: str) -> None:
    facts = {"began": began, "budget": sitting.budget, "machine": platform.node(), "steps": [asdict(result) for result in results]}
    write_whole(sitting.out / "sitting.json", json.dumps(facts, indent=1))
    write_whole(sitting.out / "sitting.html", page(results, began))
    write_whole(sitting.out / "sitting.log", joined_logs(sitting, [result.name for result in results]))


if __name__ == "__main__":
    sys.exit(main())
