"""Imports go one way: no part of the package imports a later one."""

import ast
import pathlib

import pytest

import ldm_jax

ROOT = pathlib.Path(ldm_jax.__file__).parent
# In order: each part may import those before it, except its siblings in the same line.
ORDER = (
    ("types", "errors", "watchdog", "xla_flags"),
    ("defaults", "published", "small", "distributed", "lock"),
    (
        "checks_mesh",
        "checks_diffusion",
        "checks_classifier",
        "checks_buckets",
        "checks_latents",
        "checks_training",
    ),
    ("checks",),
    ("random", "images", "config", "tensors", "download", "memory", "flops", "hlo", "topology"),
    ("machine",),
    ("roofline",),
    ("nn", "data", "diffusion"),
    ("first_stage", "denoisers", "conditioners", "metrics"),
    ("fields",),
    ("builders",),
    ("networks",),
    ("training",),
    ("arguments", "pipeline_conditions", "sampling_memory", "classifier_files"),
    ("autoguidance", "batches"),
    ("pipeline", "cli"),
    ("workdir", "sample_settings"),
    ("compatibility", "stored_latents"),
    ("convert",),
    ("weights",),
    ("judges", "sample_inputs", "extractors"),
    ("records", "preflight", "pictures"),
    ("held_out", "perceptual"),
    ("condition_judges",),
    ("condition_sheet",),
    ("condition_figures",),
    ("obedience", "likelihoods", "image_features"),
    ("image_origins",),
    ("sample_references", "evaluation_tables"),
    ("sample_metrics", "progress", "memorisation"),
    (
        "page",
        "run",
        "sample",
        "latent_statistics",
        "evaluate",
        "reconstruct",
        "ema",
        "checkpoint",
        "__init__",
    ),
    ("train", "encode", "programs", "report"),
    ("compilation", "timing", "stand_ins"),
    ("compile",),
    ("measures",),
    ("benchmark",),
)


def imported_parts(path: pathlib.Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("ldm_jax"):
            rest = node.module.split(".")[1:]
            parts |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            parts |= {name[1] for name in names if name[0] == "ldm_jax" and len(name) > 1}
    return parts


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    part = path.relative_to(ROOT).parts[0].removesuffix(".py")
    place = next(i for i, parts in enumerate(ORDER) if part in parts)
    allowed = {part}.union(*ORDER[:place])
    extra = imported_parts(path) - allowed
    assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"
