"""Make the benchmarks' voice: `python -m melrt_benchmarks.sitting.voice CHECKPOINT VOICE.melrt` exports it and builds what can be built."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from melrt import Bundle
from melrt.system import RTX_UNSUPPORTED, find_gpu


def main() -> int:
    """Export the voice, then build each engine. One that fails does not stop the others, and makes the exit code 1."""
    source, out = map(Path, sys.argv[1:3])
    if source.suffix == ".melrt":
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, out)
    else:
        from melrt_export.export import ExportOptions, export_voice

        export_voice(source, out, ExportOptions(overwrite=True), on_step=_say)
    failed = 0
    gpu = find_gpu()
    builds = _builds(out, gpu.compute_capability) if gpu else {}
    for name, build in builds.items():
        try:
            _say(f"building {name}")
            build()
        except Exception:
            traceback.print_exc()
            failed += 1
    _say(f"{out}: {', '.join(f'{one.kind} {one.precision}' for one in Bundle.open(out).manifest.artifacts)}; {failed} builds failed")
    return 1 if failed else 0


def _builds(out: Path, capability: str) -> dict[str, Callable[[], object]]:
    """Return the engines that this machine's packages can build."""
    found: dict[str, Callable[[], object]] = {}
    if importlib.util.find_spec("triton"):
        from melrt_export.fused.build import FusedOptions, build_fused

        found["the fused engine"] = lambda: build_fused(Bundle.open(out), FusedOptions((capability,)))
    flavors = ("tensorrt", *(() if capability in RTX_UNSUPPORTED else ("tensorrt_rtx",)))
    flavor = next((one for one in flavors if importlib.util.find_spec(one)), None)
    if flavor and importlib.util.find_spec("polygraphy"):
        from melrt_export.tensorrt.build import build_engine
        from melrt_export.tensorrt.options import EngineOptions

        for graph in ("interior", "edge"):
            options = EngineOptions(precision="fp16", flavor=flavor, portable=False, graph=graph)
            found[f"the {graph} engine of {flavor}"] = lambda options=options: build_engine(Bundle.open(out), options)  # type: ignore[misc]
    return found


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
