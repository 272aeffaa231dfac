"""TensorRT's builder, run through Polygraphy's loaders."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

from melrt.errors import EngineBuildError, MissingExtraError
from melrt.files.atomic import user_cache
from melrt_export.tensorrt.audit import audit_network
from melrt_export.tensorrt.options import EngineOptions

Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def polygraphy_for(flavor: str) -> Iterator[list[str]]:
    """Set Polygraphy to a flavor, and collect the builder's error messages in the list that this yields, instead of printing them.

    Raises:
        EngineBuildError: Polygraphy failed inside the context; the text has the builder's messages.
        MissingExtraError: Polygraphy is not installed.
    """
    try:
        from polygraphy import config
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingExtraError("building an engine", "polygraphy", "rtx" if flavor == "tensorrt_rtx" else "tensorrt") from error
    config.USE_TENSORRT_RTX = flavor == "tensorrt_rtx"  # read when Polygraphy first imports TensorRT: one flavor per process
    collector = _Collector()
    G_LOGGER.use_python_logging_system = True
    polygraphy_logger = logging.getLogger("Polygraphy")
    polygraphy_logger.addHandler(collector)
    propagate, polygraphy_logger.propagate = polygraphy_logger.propagate, False
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            yield collector.messages
    except PolygraphyException as error:
        raise EngineBuildError(" · ".join(dict.fromkeys([*collector.messages, str(error)]))) from error
    finally:
        polygraphy_logger.removeHandler(collector)
        polygraphy_logger.propagate = propagate


class _Collector(logging.Handler):
    """Handler that collects error messages in a list."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().strip())


def build_plan(trt: Any, onnx: bytes, profiles: list[list[list[int]]], options: EngineOptions, on_progress: Progress) -> bytes:
    """Parse the graph, audit its network, and build the engine. Call this inside `polygraphy_for(trt.__name__)`.

    Args:
        trt: Module of the flavor.
        onnx: The graph.
        profiles: Smallest, best and largest shape (B, M, T) of the input, for each optimization profile.
        options: Options of the build.
        on_progress: Called with the name of a phase, its steps done and their number.

    Returns:
        The serialized engine.

    Raises:
        EngineBuildError: The parsed network does not have the requested precision.
        KeyboardInterrupt: The build was interrupted.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxBytes
    from polygraphy.exception import PolygraphyException

    # TensorRT versions without the flag build only strongly typed networks
    flagged = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, parser = NetworkFromOnnxBytes(onnx, strongly_typed=flagged)()
    audit_network(trt, network, options.precision)
    monitor = _progress_monitor(trt, on_progress)
    create, cache = _configuration(trt, profiles, options, monitor)

    def configure(builder: Any, network: Any) -> Any:
        config = create(builder, network)
        flag = trt.BuilderFlag.TF32  # on by default; CreateConfigRTX leaves it so
        config.set_flag(flag) if options.precision == "tf32" else config.clear_flag(flag)
        return config

    try:
        return bytes(EngineBytesFromNetwork((builder, network, parser), config=configure, save_timing_cache=cache)())
    except PolygraphyException:
        if monitor.interrupted:
            raise KeyboardInterrupt from None
        raise


def _configuration(
    trt: Any, profiles: list[list[list[int]]], options: EngineOptions, monitor: Any
) -> tuple[Callable[..., Any], str | None]:
    """Return Polygraphy's loader of the builder's configuration, and the file of the timing cache if the flavor has one."""
    from polygraphy.backend.trt import CreateConfig, Profile

    common = {
        "profiles": [Profile().add("mel", *profile) for profile in profiles],
        "builder_optimization_level": options.optimization_level,
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # makes the inspector state each layer's type
        "refittable": options.refittable,
    }
    if options.workspace is not None:
        common["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options.workspace << 20}
    if trt.__name__ == "tensorrt_rtx":
        from polygraphy.backend.tensorrt_rtx import CreateConfigRTX

        return CreateConfigRTX(use_gpu=not options.portable, **common), None
    file = options.timing_cache or user_cache() / f"tensorrt-{trt.__version__}.timing"
    file.parent.mkdir(parents=True, exist_ok=True)
    if options.compatible == "hardware":
        common["hardware_compatibility_level"] = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    common |= {"load_timing_cache": str(file), "version_compatible": options.compatible == "version"}
    return CreateConfig(tf32=options.precision == "tf32", **common), str(file)


def _progress_monitor(trt: Any, on_progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Monitor that reports the builder's phases.

        An exception cannot pass through the builder, so Ctrl-C in a callback is recorded and raised after the build.
        """

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._report(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._report(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._report(phase_name, self.steps[phase_name])

        def _report(self, phase_name: str, done: int) -> None:
            try:
                on_progress(phase_name, done, self.steps.get(phase_name, 1))
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
