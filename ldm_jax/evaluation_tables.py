"""Records of evaluations as text."""

from __future__ import annotations

from typing import Any

UNITS = {"psnr": "dB", "kl_per_element": "nats", "mae": "of values from -1 to 1"}
UNITS |= {"low_res_psnr": "dB", "luma_error": "levels", "stroke_distance": "levels"}
UNITS |= {"change_outside_hole": "levels"}


def table(record: dict[str, Any]) -> str:
    """What the record says, a line for each number."""
    where = f", {record['where']}" if record["where"] else ""
    size = record["resolution"]
    lines = [
        f"{record['num_images']} images of {size}x{size} ({record['source']}, {record['split']}"
        f"{where})"
    ]
    for name, value in record["reconstruction"].items():
        lines.append(f"  {name:<16} {value:>9.4f} {UNITS.get(name, '')}".rstrip())
    return "\n".join(lines)


def condition_table(record: dict[str, Any]) -> str:
    """What a record of conditions says: a line for each figure, a column for each reference."""
    where = f", {record['where']}" if record["where"] else ""
    lines = [
        f"{record['num_images']} conditions ({record['source']}, {record['split']}{where}), step "
        f"{record['checkpoint_step']}, {record['sampler']}, {record['steps']} steps, guidance "
        f"{record['guidance_scale']:g}"
    ]
    figures = record["figures"]
    columns = list(dict.fromkeys(column for values in figures.values() for column in values))
    lines.append(" " * 26 + "".join(f"{column:>12}" for column in columns))
    for name, values in figures.items():
        shown = (f"{values[c]:12.4f}" if c in values else f"{'-':>12}" for c in columns)
        lines.append(f"  {name:<24}{''.join(shown)} {UNITS.get(name, '')}".rstrip())
    for kind, judge in record["judges"].items():
        lines.append(
            f"judge ({kind}): {judge['held_out']:.4f} on real images that it was not fitted to; "
            f"fitted to {judge['images']}"
        )
    return "\n".join(lines)


def likelihood_table(record: dict[str, Any]) -> str:
    """What a record of likelihoods says: a line for each figure, and for each part of the bound."""
    where = f", {record['where']}" if record["where"] else ""
    shape = "x".join(map(str, record["shape"]))
    lines = [
        f"{record['num_images']} images ({record['source']}, {record['split']}{where}), step "
        f"{record['checkpoint_step']}, seed {record['seed']}: bits per dimension of "
        f"{record['of']} ({shape})"
    ]
    ode = record["ode"]
    settings = {"ode": f"{ode['steps']} steps, from noise {ode['noise']:.2g}"}
    if "vlb" in record:
        vlb = record["vlb"]
        settings["vlb"] = f"{vlb['calls']} time steps, variance {vlb['variance']}"
    for name, setting in settings.items():
        mean, error = record[name]["bits_per_dim"], record[name]["standard_error"]
        lines.append(f"  {name:<10} {mean:>9.4f} +- {error:.4f}  {setting}")
    if "vlb" in record:
        parts = ("prior", "kl", "decoder")
        lines += [f"    {part:<8} {record['vlb'][part]:>9.4f}" for part in parts]
    return "\n".join(lines)


def samples_table(record: dict[str, Any]) -> str:
    """What a record of samples says: a line for each metric, with its error."""
    lines = [f"{_origin(record)}:"]
    for name, found in record["metrics"].items():
        error = next((f" +- {found[e]:.4f}" for e in ("standard_error", "std") if e in found), "")
        lines.append(f"  {name:<16} {found['value']:>10.4f}{error}")
    for name, network in record["networks"].items():
        resize = f", resized as '{network['resize']}'" if network["resize"] else ""
        lines.append(f"network ({name}): {network['digest'][:12]}{resize}")
    for name, found in record["references"].items():
        count = f"{found['images']:,} images" if found["images"] else "unknown number of images"
        lines.append(f"reference ({name}): {found['origin']}, {count}, {found['digest'][:12]}")
    return "\n".join(lines + [f"note: {note}" for note in record["notes"]])


def memorisation_table(record: dict[str, Any]) -> str:
    """What a record of memorisation says: a line for each space."""
    training, held = record["training"], record["held_out"]
    lines = [
        f"{record['num_samples']} samples beside {training['num_images']:,} training images"
        f"{' and their mirror images' if training['mirrored'] else ''} ({training['source']}, "
        f"{training['split']}) and {held['num_images']} held-out ones ({held['source']}, "
        f"{held['split']})",
        f"{'distance to the nearest':<26}{'threshold':>12}{'share below':>20}{'held out':>12}"
        f"{'median':>12}{'held out':>12}",
    ]
    for name, found in record["spaces"].items():
        share = f"{found['share']:.4f} +- {found['standard_error']:.4f}"
        lines.append(
            f"  {name:<24}{found['threshold']:>12.4f}{share:>20}{found['held_out_share']:>12.4f}"
            f"{found['median']:>12.4f}{found['held_out_median']:>12.4f}"
        )
    return "\n".join(lines)


def samples_line(record: dict[str, Any]) -> str:
    """The same in one line of a list in Markdown."""
    values = []
    for name, found in record["metrics"].items():
        error = next((f" ± {found[e]:.4g}" for e in ("standard_error", "std") if e in found), "")
        values.append(f"{name} {found['value']:.4g}{error}")
    against = {
        f"{found['origin']} ({found['images']:,} images)" if found["images"] else found["origin"]
        for found in record["references"].values()
    }
    networks = ", ".join(f"{name} {n['digest'][:12]}" for name, n in record["networks"].items())
    text = f"- **{', '.join(values)}** of {_origin(record)}"
    text += f", against {' and '.join(sorted(against))}" if against else ""
    return f"{text}; {networks}"


def _origin(record: dict[str, Any]) -> str:
    """Which samples a record is of."""
    height, width = record["size"]
    text = f"{record['num_samples']:,} {record['samples']} of {height}x{width}"
    if "checkpoint_step" not in record:
        return text
    text += f" (step {record['checkpoint_step']}, {record['sampler']}, {record['steps']} steps"
    text += f", guidance {record['guidance_scale']:g}" if record["guidance_scale"] != 1 else ""
    return f"{text}, seed {record['seed']})"
