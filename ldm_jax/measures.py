"""What `ldm_jax.benchmark` measures of a config: functions (config, options) -> record.

A record says what was measured; its 'rows' are dicts of the same keys.
"""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from ldm_jax import arguments, builders, programs, stand_ins, timing
from ldm_jax.data.buckets import make_buckets
from ldm_jax.data.device import DeviceBatches, to_device
from ldm_jax.data.pipeline import Batches, CachedSource
from ldm_jax.data.sources import Source
from ldm_jax.data.task_fields import passed_on
from ldm_jax.data.transforms import CachedTransform
from ldm_jax.flops import count_flops
from ldm_jax.machine import processors
from ldm_jax.preflight import open_data, open_training_data
from ldm_jax.stored_latents import stored_null
from ldm_jax.training.latents import task_transform, transform
from ldm_jax.training.sharding import batch_sharding, local_part, make_mesh, put, replicated

PREFETCH = 2  # finished batches that may wait, as in training
TRACED = 3  # calls that a profile shows


class Options(NamedTuple):
    """What the command line says of a measurement.

    Attributes:
        workdir: of the run, whose tokenizer may be needed.
        seconds: that each row is measured for, after a warm-up.
        threads: numbers of threads to try; empty = powers of two up to the processors.
        batch_size: images at a time, over all devices; 0 = what the config says.
        steps: of the sampler; 0 = what the config says.
        fixed_batch: training sees one batch of random numbers and reads no data.
        profile: folder for a trace of a few calls; '' = none.
    """

    workdir: pathlib.Path
    seconds: float
    threads: tuple[int, ...] = ()
    batch_size: int = 0
    steps: int = 0
    fixed_batch: bool = False
    profile: str = ""


class Built(NamedTuple):
    """A compiled program.

    Attributes:
        call: the program.
        flops: of a call, over all devices, without what is computed again to save memory.
        record: 'compile_seconds', 'flops_per_image' and 'memory_per_device' in bytes.
    """

    call: jax.stages.Compiled
    flops: float
    record: dict[str, Any]


# -- input ----------------------------------------------------------------------------------------


def measure_data(config: ConfigDict, options: Options) -> dict[str, Any]:
    """Images per second of the input pipeline alone, for several numbers of threads."""
    block = config.train if config.train.steps > 0 else config.first_stage.train
    size, c = options.batch_size or block.batch_size, config.data
    source, rows = open_data(config, options.workdir), []
    buckets = make_buckets(source, c.buckets, c.threads) if c.buckets else None
    for threads in options.threads or _powers(processors()):
        batches = Batches(
            source,
            task_transform(config),
            batch_size=size,
            seed=config.seed,
            fields=passed_on(c.fields),
            threads=threads,
            prefetch=PREFETCH,
            buckets=buckets,
        )
        found = timing.throughput(batches, size, options.seconds, threads + PREFETCH + 1)
        rows.append({"threads": threads, **found})
    return {
        "processors": processors(),
        "source": c.source,
        "images": len(source),
        "resolution": c.resolution,
        "buckets": [list(size) for size in c.buckets],
        "batch_size": size,
        "rows": rows,
    }


def _feed(
    config: ConfigDict, source: Source, stage: str, batch: dict[str, Any], mesh: Mesh
) -> DeviceBatches:
    """The batches of training, on the devices ahead of their use.

    Where latents are kept in memory, random ones stand for them; `batch` says how they look.
    """
    block, chosen, fields = config.train, task_transform(config), passed_on(config.data.fields)
    if stage == "first_stage":
        block, chosen, fields = config.first_stage.train, transform(config), ()
    elif "moments" in batch:
        flips = 1 + config.data.flip
        shape = len(source), flips, *batch["moments"].shape[1:]
        noise = np.random.default_rng(0).standard_normal(shape[1:], np.float32)
        told = {name: np.zeros(leaf.shape[1:], leaf.dtype) for name, leaf in batch.items()}
        del told["moments"]
        source = CachedSource(
            source,
            {"moments": np.broadcast_to(noise, shape)},
            {name: np.broadcast_to(x, (len(source), *x.shape)) for name, x in told.items()},
        )
        chosen, fields = CachedTransform(flip=config.data.flip), tuple(told)
    index, processes = local_part(mesh)
    batches = Batches(
        source,
        chosen,
        batch_size=block.batch_size,
        seed=config.seed,
        fields=fields,
        threads=config.data.threads,
        process_index=index,
        process_count=processes,
    )
    return to_device(batches, batch_sharding(mesh))


# -- programs -------------------------------------------------------------------------------------


def measure_train(config: ConfigDict, options: Options, stage: str = "train") -> dict[str, Any]:
    """Steps of training, on one batch over and over, and with the input pipeline.

    `data_wait_share` is the share of the time that the host waits for the next batch, as in the
    metrics of a run. Of several buckets, the size `data.resolution` is measured.
    """
    config = _with_batch_size(config, options)
    config.data.buckets = ()
    mesh = make_mesh(config.mesh)
    program = programs.PROGRAMS[stage](config, mesh)
    state, frozen, batch, key = program.arguments
    first, feed, null = stand_ins.random_inputs(batch), None, {}
    if not options.fixed_batch:
        opened = open_data if stage == "first_stage" else open_training_data
        source = opened(config, options.workdir)
        null = put(stored_null(config, source), replicated(mesh))
        feed = _feed(config, source, stage, batch, mesh)
        first = next(feed)
    given = state, frozen | stand_ins.specs(null), stand_ins.specs(first), key

    def build(config: ConfigDict) -> programs.Program:
        return programs.PROGRAMS[stage](config, mesh)._replace(arguments=given)

    built, count = _compile(config, build, mesh), program.images
    now = [stand_ins.random_state(state)]
    frozen, key = stand_ins.random_variables(frozen) | null, stand_ins.random_inputs(key)

    def step(batch: dict[str, jax.Array]) -> Any:
        now[0], metrics = built.call(now[0], frozen, batch, key)
        return metrics

    peak = _peak(config.train if stage == "train" else config.first_stage.train)
    times = timing.call_times(lambda: step(first), options.seconds, ahead=1)
    rate = functools.partial(_rates, built=built, peak=peak, mesh=mesh)
    rows = [{"batches": "one", **rate(times, count), "data_wait_share": 0.0}]
    if feed is not None:
        with feed:
            waited, begin = feed.wait_seconds, time.perf_counter()
            times = timing.call_times(lambda: step(next(feed)), options.seconds, ahead=1)
            share = (feed.wait_seconds - waited) / (time.perf_counter() - begin)
        rows.append({"batches": "read", **rate(times, count), "data_wait_share": share})
    _trace(lambda: step(first), options.profile)
    return _record(config, built, peak, mesh, rows)


def measure_sample(config: ConfigDict, options: Options) -> dict[str, Any]:
    """Sampling from seeds to pixels, with the config's sampler and guidance: a batch, and one
    image.

    `median_ms` of the latter is the latency of an image.
    """
    rows, measured, mesh = [], [], make_mesh(config.mesh)
    config = _with_batch_size(config, options)
    config.sample.steps = options.steps or config.sample.steps
    peak = _peak(config.train)
    for batch_size in dict.fromkeys((config.sample.batch_size, 1)):
        config.sample.batch_size = batch_size
        program = sampling_program(config, mesh)
        built = _compile(config, lambda config: sampling_program(config, mesh), mesh)
        variables, inputs, *shared = program.arguments
        variables = stand_ins.random_variables(variables)
        inputs = stand_ins.random_inputs(inputs)
        call = functools.partial(built.call, variables, inputs, *shared)
        times = timing.call_times(call, options.seconds, least=1)
        row = {"images": program.images, "steps": config.sample.steps}
        row |= _rates(times, program.images, built, peak, mesh)
        rows.append(row | {"steps_per_second": 1e3 * row["steps"] / row["median_ms"]})
        if not measured:
            _trace(call, options.profile, calls=1)
        measured.append(built)
    return _record(config, measured[0], peak, mesh, rows)


def sampling_program(config: ConfigDict, mesh: Mesh) -> programs.Program:
    """The whole way from seeds to pixels; guidance and the sampler's table hold their values."""
    program, s = programs.sample(config, mesh), config.sample
    process = builders.build_schedule(config)
    table = arguments.choose_table(config, process, s.sampler, None, None, None, 1.0, (1, 1))
    shared = jax.tree.map(jnp.float32, arguments.make_guidance(config)), table
    return program._replace(
        function=functools.partial(program.function, decode=True),
        arguments=(
            *program.arguments[:2],
            *put(jax.tree.map(jnp.asarray, shared), replicated(mesh)),
        ),
        calls=1,
    )


def measure_coding(config: ConfigDict, options: Options, what: str) -> dict[str, Any]:
    """The first stage alone: `what` is encode (images to moments) or decode (latents to pixels)."""
    config, mesh = _with_batch_size(config, options), make_mesh(config.mesh)
    built = _compile(config, lambda config: programs.PROGRAMS[what](config, mesh), mesh)
    program, peak = programs.PROGRAMS[what](config, mesh), _peak(config.first_stage.train)
    variables, inputs = program.arguments
    variables, inputs = stand_ins.random_variables(variables), stand_ins.random_inputs(inputs)
    call = functools.partial(built.call, variables, inputs)
    times = timing.call_times(call, options.seconds)
    rows = [{"images": program.images, **_rates(times, program.images, built, peak, mesh)}]
    _trace(call, options.profile)
    return _record(config, built, peak, mesh, rows)


MEASURES: dict[str, Callable[[ConfigDict, Options], dict[str, Any]]] = {
    "train": measure_train,
    "first_stage": functools.partial(measure_train, stage="first_stage"),
    "sample": measure_sample,
    "encode": functools.partial(measure_coding, what="encode"),
    "decode": functools.partial(measure_coding, what="decode"),
    "data": measure_data,
}


def _with_batch_size(config: ConfigDict, options: Options) -> ConfigDict:
    """A copy of the config with the batch size of the command line."""
    config = ConfigDict(config).copy_and_resolve_references()
    if options.batch_size:
        for block in (config.train, config.first_stage.train, config.sample):
            block.batch_size = options.batch_size
    return config


def _compile(config: ConfigDict, build: Callable[[ConfigDict], Any], mesh: Mesh) -> Built:
    """Compiles the program that `build` makes of a config, and counts its work."""
    begin, program = time.perf_counter(), build(config)
    traced = program.trace(mesh)
    call = traced.lower().compile()
    seconds = time.perf_counter() - begin
    if config.denoiser.remat != "none":
        plain = ConfigDict(config).copy_and_resolve_references()
        plain.denoiser.remat = "none"
        traced = build(plain).trace(mesh)
    flops = count_flops(traced.jaxpr)
    record = {
        "compile_seconds": seconds,
        "flops_per_image": flops / program.images,
        "memory_per_device": timing.memory_of(call),
    }
    return Built(call, flops, record)


def _peak(block: ConfigDict) -> float:
    return timing.matrix_peak(block.dtype)


def _rates(
    times: list[float], images: int, built: Built, peak: float, mesh: Mesh
) -> dict[str, float]:
    """The columns that all programs have."""
    found = timing.summary(times, images)
    seconds = 1e-3 * found["median_ms"]
    return found | {"mfu": built.flops / seconds / (peak * mesh.size)}


def _record(
    config: ConfigDict, built: Built, peak: float, mesh: Mesh, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """What all records of programs say."""
    used = timing.most_in_use()
    built.record["memory_per_device"] |= {} if used is None else {"most in use": used}
    return {
        "device": jax.devices()[0].device_kind,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "processors": processors(),
        "jax": jax.__version__,
        "dtype": {"denoiser": config.train.dtype, "first stage": config.first_stage.train.dtype},
        "matrix_peak_flops_per_second": peak,
        **built.record,
        "rows": rows,
    }


def _trace(call: Callable[[], Any], folder: str, calls: int = TRACED) -> None:
    """Writes a trace of a few calls, where that is asked for."""
    if folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                jax.block_until_ready(call())


def _powers(most: int) -> tuple[int, ...]:
    return tuple(2**i for i in range(most.bit_length()))


# -- text -----------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of the same keys as text, in columns."""
    lines = [[key.replace("_", " ") for key in rows[0]]]
    lines += [[f"{x:.4g}" if isinstance(x, float) else str(x) for x in r.values()] for r in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def show(record: dict[str, Any]) -> str:
    """A record as text: a line for each of its values, and the table of its rows."""
    lines = []
    for key, value in record.items():
        if key == "memory_per_device":
            value = {name: f"{size / 2**20:.1f} MiB" for name, size in value.items()}
        if isinstance(value, dict):
            value = ", ".join(f"{name} {part}" for name, part in value.items())
        if key != "rows":
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{key.replace('_', ' ')}: {shown}")
    return "\n".join([*lines, table(record["rows"])])
