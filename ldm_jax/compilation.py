"""Programs compiled ahead of time for devices that need not be there, and what is known of them."""

from __future__ import annotations

import math
import re
import time
from typing import Any

from ml_collections import ConfigDict

from ldm_jax.errors import UserError
from ldm_jax.topology import GIB, Slice


def compile_program(config: ConfigDict, piece: Slice, what: str) -> dict[str, Any]:
    """Compiles a program for devices and measures it; nothing runs.

    Returns the record that --out writes; sizes are bytes and times seconds, of one chip and call:
    'memory' by what it is, 'flops', 'bytes_moved', 'collectives', and 'estimate' where there are
    figures of the chip. 'memory' alone, with 'fits' False, says that the compiler gave up.

    Raises:
        UserError: the config does not suit the devices, or the state alone does not fit.
    """
    import jax

    from ldm_jax import hlo, programs
    from ldm_jax.training.sharding import make_mesh

    begin, mesh = time.perf_counter(), make_mesh(config.mesh, piece.devices)
    program = programs.PROGRAMS[what](config, mesh)
    kept = {name: programs.bytes_per_device(part) for name, part in program.parts.items()}
    record: dict[str, Any] = {
        "config": config.name,
        "what": what,
        "topology": piece.name,
        "chips": len(piece.devices),
        "mesh": dict(mesh.shape),
        "images": program.images,
        "calls": program.calls,
        "elements": {name: programs.count(part) for name, part in program.parts.items()},
        "versions": {"jax": jax.__version__, "libtpu": _version("libtpu")},
        "memory": dict(kept),
    }
    _check_state(program, config, piece, sum(kept.values()))
    traced = program.trace(mesh)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        needed = _exceeded(str(error))
        if needed is None:
            raise
        return record | {"fits": False, "needed": needed, "compile_seconds": _since(begin)}
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    record["memory"] |= {
        "inputs, padding": max(0, stats.argument_size_in_bytes - sum(kept.values())),
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "activations": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(record["memory"].values())
    record |= work(traced, config, what, mesh)
    record |= {
        "fits": None if piece.chip is None else total <= piece.chip.hbm,
        "compiler_flops": float(cost.get("flops", 0.0)),
        # The compiler counts the body of a loop once: bytes are taken to grow as operations do.
        "bytes_moved": record.pop("repeats") * float(cost.get("bytes accessed", 0.0)),
        "compile_seconds": _since(begin),
    }
    text = compiled.as_text()
    return record | _exchanges(record, hlo.collectives(text), hlo.cycles(text), mesh, piece)


def work(traced: Any, config: ConfigDict, what: str, mesh: Any) -> dict[str, float]:
    """Operations of a traced program, for each chip, before it is compiled.

    'flops' are those that run, 'model_flops' those without what the backward pass computes again,
    and 'repeats' is the share by which they exceed a count with each loop once.
    """
    from ldm_jax import programs
    from ldm_jax.flops import count_flops

    executed = model = count_flops(traced.jaxpr)
    if what == "train" and config.denoiser.remat != "none":
        plain = config.copy_and_resolve_references()
        plain.denoiser.remat = "none"
        model = count_flops(programs.PROGRAMS[what](plain, mesh).trace(mesh).jaxpr)
    once = count_flops(traced.jaxpr, loops=False)
    return {
        "flops": executed / mesh.size,
        "model_flops": model / mesh.size,
        "repeats": executed / once if once else 1.0,
    }


def _exchanges(
    record: dict[str, Any], found: list[Any], cycles: int, mesh: Any, piece: Slice
) -> dict[str, Any]:
    """The exchanges by kind and axes of the mesh, and the estimate."""
    from ldm_jax.hlo import crossed_axes
    from ldm_jax.roofline import estimate, exchange_seconds

    rows: dict[tuple[str, str], dict[str, Any]] = {}
    timed, order = [], list(mesh.devices.flat)
    for each in found:
        axes = " x ".join(crossed_axes(each.groups, dict(mesh.shape)))
        row = rows.setdefault(
            (each.kind, axes), dict(kind=each.kind, axes=axes, count=0, bytes=0.0, known=True)
        )
        row["count"] += each.count
        row["bytes"] += each.count * each.bytes
        row["known"] &= each.known
        if piece.chip:
            timed.append((each, exchange_seconds(each, piece, order)))
            row["seconds"] = row.get("seconds", 0.0) + each.count * timed[-1][1]
    result: dict[str, Any] = {"collectives": sorted(rows.values(), key=lambda row: -row["bytes"])}
    if piece.chip:
        times = estimate(piece.chip, record["flops"], record["bytes_moved"], timed)
        of_calls = {"overlapped": times.overlapped, "serial": times.serial}
        peak = record["model_flops"] / piece.chip.peak
        result["estimate"] = {
            **times._asdict(),
            **of_calls,
            "limit": times.limit,
            "kernels": cycles / piece.chip.clock if piece.chip.clock else None,
            "images_per_second": {
                name: record["images"] / (record["calls"] * seconds)
                for name, seconds in of_calls.items()
            },
            "mfu": {name: peak / seconds for name, seconds in of_calls.items()},
        }
    return result


def _check_state(program: Any, config: ConfigDict, piece: Slice, held: int) -> None:
    """Refuses a slice whose chips cannot hold what stays on them, before it is compiled.

    Raises:
        UserError: with the least mesh.fsdp that would do, if any.
    """
    from ldm_jax import programs
    from ldm_jax.training.sharding import make_mesh

    if piece.chip is None or held <= piece.chip.hbm:
        return
    count, block = len(piece.devices), ConfigDict(config.mesh).copy_and_resolve_references()
    size = f"{held / GIB:.2f} GiB of the {piece.chip.hbm / GIB:.2f} GiB of a chip"
    said = f"weights, averages and optimiser alone take {size} of {piece.name}"
    for fsdp in range(config.mesh.fsdp + 1, count + 1):
        if count % (fsdp * block.tensor) or block.dcn_data > 1:
            continue
        block.update(data=-1, fsdp=fsdp)
        less = programs.bytes_if_split(program, make_mesh(block, piece.devices))
        if less <= piece.chip.hbm:
            raise UserError(f"{said}: --config.mesh.fsdp={fsdp} leaves {less / GIB:.2f} GiB")
    least = math.ceil(held * config.mesh.fsdp * config.mesh.tensor / piece.chip.hbm)
    raise UserError(f"{said}: no mesh.fsdp is enough, take {least} chips or more")


def _exceeded(message: str) -> float | None:
    """Bytes that a program needs on a chip, where the compiler's error is that these are missing"""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    said = re.search(
        r"\((\d+(?:\.\d+)?)([KMGT])\) exceeds|Used (\d+(?:\.\d+)?)([KMGT]) of", message
    )
    if not said:
        return None
    number, unit = [group for group in said.groups() if group]
    return float(number) * 1024 ** (" KMGT".index(unit))


def _since(begin: float) -> float:
    return round(time.perf_counter() - begin, 1)


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def show(record: dict[str, Any], hbm: float | None) -> str:
    """What a record says, as text; `hbm` is a chip's memory in bytes."""
    axes = " x ".join(f"{name} {size}" for name, size in record["mesh"].items())
    lines = [
        f"{record['config']}, {record['what']}, {record['topology']}: {record['chips']} chips, "
        f"mesh {axes}, {record['images']} images",
        f"parameters: {record['elements']['parameters'] / 1e6:,.2f}M",
        "memory per chip, GiB:",
    ]
    lines += [f"  {name:<18}{size / GIB:9.3f}" for name, size in record["memory"].items()]
    if "flops" not in record:
        lines.append(f"  total {record['needed'] / GIB:9.3f} of {hbm / GIB:.2f}: DOES NOT FIT")
        return "\n".join(lines)
    total = f"  {'total':<18}{sum(record['memory'].values()) / GIB:9.3f}"
    if hbm:
        total += f" of {hbm / GIB:.2f}: " + ("fits" if record["fits"] else "DOES NOT FIT")
    lines += [
        total,
        "work per chip and call:",
        f"  operations        {record['flops'] / 1e12:9.4f} TFLOP"
        + f", {record['model_flops'] / 1e12:.4f} without what is computed again"
        * (record["model_flops"] < record["flops"])
        + f" (the compiler counts {record['compiler_flops'] / 1e12:.4f}, with each loop once)",
        f"  bytes moved       {record['bytes_moved'] / 1e9:9.3f} GB",
        "exchanges per call:",
    ]
    for row in record["collectives"]:
        took = f"{1e3 * row['seconds']:9.3f} ms" if "seconds" in row else ""
        known = "" if row["known"] else " at least (a loop of unknown length)"
        lines.append(
            f"  {row['kind']:<18} over {row['axes']:<14} {row['count']:>6} times "
            f"{row['bytes'] / 1e6:11.3f} MB {took}{known}"
        )
    if not record["collectives"]:
        lines.append("  none")
    if "estimate" in record:
        lines += _show_estimate(record)
    lines.append(f"compiled in {record['compile_seconds']:.0f} s; nothing has run")
    return "\n".join(lines)


def _show_estimate(record: dict[str, Any]) -> list[str]:
    found = record["estimate"]
    best, worst = found["overlapped"], found["serial"]
    rate, mfu = found["images_per_second"], found["mfu"]
    lines = [
        "ESTIMATE from published figures (all at full rate; real steps are slower):",
        f"  compute {1e3 * found['compute']:.3g} ms, memory {1e3 * found['memory']:.3g} ms, "
        f"communication {1e3 * found['communication']:.3g} ms: limited by {found['limit']}",
    ]
    if found["kernels"]:
        ms = 1e3 * found["kernels"]
        lines.append(f"  kernels one after the other, by the compiler's own estimate: {ms:.3g} ms")
    lines.append(
        f"  a call takes {1e3 * best:.3g} ms if all overlaps, {1e3 * worst:.3g} ms if nothing does:"
        f" {rate['overlapped']:.4g} to {rate['serial']:.4g} images/s, "
        f"MFU {100 * mfu['overlapped']:.0f} to {100 * mfu['serial']:.0f} %"
    )
    if record["calls"] > 1:
        lines.append(f"  (images/s: {record['calls']} calls for each batch, without decoding)")
    return lines
