"""Build the engines of a voice. An INT8 engine is timed against FP16: one that is not faster costs quality for nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from melrt.backends.tensorrt.gpu_arrays import preserved_context
from melrt.bundle import Bundle
from melrt.errors import EngineBuildError
from melrt.system import find_gpu
from melrt.timing import compare_paired
from melrt_export.graph.rewrites import Variant
from melrt_export.int8_plan import MIN_SPEEDUP
from melrt_export.tensorrt.build import BuiltEngine, build_unsaved_engine
from melrt_export.tensorrt.options import ENGINE_WINDOW, EngineOptions, default_frames
from melrt_export.tensorrt.polygraphy import Progress
from melrt_export.tensorrt.variant_search import ROUNDS, Candidate, VariantTrial, find_fastest_engine

NOT_COMPARED = "not compared"


def build_engines(
    bundle: Bundle,
    wanted: Iterable[EngineOptions],
    on_progress: Progress = lambda *_: None,
    *,
    try_variants: bool = False,
    force: bool = False,
) -> Iterator[tuple[BuiltEngine, list[VariantTrial]]]:
    """Build several engines and add each to the bundle. An edge engine takes the window of the interior engine before it.

    Args:
        bundle: Bundle with the ONNX graphs.
        wanted: Options of each engine.
        on_progress: Called with the name of a phase, its steps done and their number.
        try_variants: Search for the fastest variant of each engine.
        force: Add an INT8 engine without comparing it with FP16.

    Yields:
        Each engine with its entry in the bundle, and the trials of its search.

    Raises:
        EngineBuildError, BundleError, MissingExtraError: As `find_fastest_engine`, `build_engine` and `compare_with_half` raise them.
    """
    window = ENGINE_WINDOW
    for options in wanted:
        if options.frames is None and options.graph == "edge":
            options = replace(options, frames=default_frames("edge", bundle.manifest.receptive_field.smallest_input, window))
        if try_variants:
            built, trials = find_fastest_engine(bundle, options, on_progress)
        else:
            built, trials = build_unsaved_engine(bundle, options, on_progress), []
        if options.precision == "int8":
            built = compare_with_half(bundle, built, options, on_progress, force=force)
        if options.graph == "interior":
            window = built.entry.target["profile"][1][2]
        yield built.add_to(bundle), trials


def compare_with_half(
    bundle: Bundle, built: BuiltEngine, options: EngineOptions, on_progress: Progress = lambda *_: None, *, force: bool = False
) -> BuiltEngine:
    """Compare an INT8 engine with the FP16 engine of the same graph, variant and profile.

    Args:
        bundle: Bundle with both graphs.
        built: The INT8 engine.
        options: Options that it was built with.
        on_progress: Called with the name of a phase, its steps done and their number.
        force: Accept any INT8 engine without a comparison.

    Returns:
        The engine, whose entry states in `target.against_fp16` how many times faster it is, or that this was not compared: without a
        GPU, and for the edge graph, which runs only the ends of utterances.

    Raises:
        EngineBuildError: It is less than 5 % faster than FP16 on this GPU.
        BundleError: The bundle has no FP16 graph.
    """
    gain: float | str = NOT_COMPARED
    if options.graph == "interior" and not force and find_gpu():
        gain = round(_times_faster(bundle, built, options, on_progress), 3)
        if gain < MIN_SPEEDUP:
            raise EngineBuildError(
                f"INT8 is {gain:.2f} times as fast as FP16 on this GPU. It must be at least {MIN_SPEEDUP:g} times as fast to be worth its "
                "noise, so the engine was not added to the bundle. Build with `--precision fp16`, or add --force."
            )
    return replace(built, entry=replace(built.entry, target={**built.entry.target, "against_fp16": gain}))


def _times_faster(bundle: Bundle, built: BuiltEngine, options: EngineOptions, on_progress: Progress) -> float:
    """Return the median ratio of paired times. The engines come from the cache if they were built before."""
    target = built.entry.target
    least, best, most = (shape[2] for shape in target["profile"])
    same = replace(options, frames=(least, best, most), variant=Variant.from_dict(target["variant"]), cached=True)
    with preserved_context():
        int8, half = (Candidate(bundle, replace(same, precision=precision)) for precision in ("int8", "fp16"))
        int8.prepare(on_progress)
        try:
            half.prepare(on_progress)
            try:
                timings = compare_paired(half.run, int8.run, ROUNDS)
            finally:
                half.close()
        finally:
            int8.close()
    ratio = timings[0].ratio_to(timings[1])[0]
    return ratio * int8.frames_per_run / half.frames_per_run
