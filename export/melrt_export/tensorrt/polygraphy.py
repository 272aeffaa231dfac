"""TensorRT's builder, driven through Polygraphy's loaders."""

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
    """Set Polygraphy to a flavor, and collect what the builder complains of instead of printing it."""
    try:
        from polygraphy import config
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingExtraError("building an engine", "polygraphy", "rtx" if flavor == "tensorrt_rtx" else "tensorrt") from error
    config.USE_TENSORRT_RTX = flavor == "tensorrt_rtx"  # read when Polygraphy first touches TensorRT: one flavor a process
    collector = _Collector()
    G_LOGGER.use_python_logging_system = True
    sink = logging.getLogger("Polygraphy")
    sink.addHandler(collector)
    propagate, sink.propagate = sink.propagate, False
    try:
        with G_LOGGER.verbosity(G_LOGGER.ERROR):
            yield collector.messages
    except PolygraphyException as error:
        raise EngineBuildError(" · ".join(dict.fromkeys([*collector.messages, str(error)]))) from error
    finally:
        sink.removeHandler(collector)
        sink.propagate = propagate


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().strip())


def build_plan(trt: Any, onnx: bytes, profile: list[list[int]], options: EngineOptions, on_progress: Progress) -> bytes:
    """Parse, audit and build; within `polygraphy_for` the flavor.

    Raises:
        EngineBuildError: The parsed network is not of the precision asked for.
        KeyboardInterrupt: It was interrupted.
    """
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxBytes
    from polygraphy.exception import PolygraphyException

    # where the flag is gone, every network is strongly typed
    flagged = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, parser = NetworkFromOnnxBytes(onnx, strongly_typed=flagged)()
    audit_network(trt, network, options.precision)
    monitor = _monitor(trt, on_progress)
    create, cache = _configuration(trt, profile, options, monitor)

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


def _configuration(trt: Any, profile: list[list[int]], options: EngineOptions, monitor: Any) -> tuple[Callable[..., Any], str | None]:
    """Polygraphy's maker of the builder's configuration, and the timing cache's file."""
    from polygraphy.backend.trt import CreateConfig, Profile

    common = {
        "profiles": [Profile().add("mel", *profile)],
        "builder_optimization_level": options.optimization_level,
        "progress_monitor": monitor,
        "profiling_verbosity": trt.ProfilingVerbosity.DETAILED,  # the inspector says each layer's type
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


def _monitor(trt: Any, on_progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Hands the builder's phases on; an exception in a callback cannot cross the builder, so Ctrl-C is kept for after it."""

        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}
            self.interrupted = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return not self.interrupted

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps[phase_name])

        def _tell(self, phase_name: str, done: int) -> None:
            try:
                on_progress(phase_name, done, self.steps.get(phase_name, 1))
            except KeyboardInterrupt:
                self.interrupted = True

    return Monitor()
