"""Imports go one way: no part of the package imports a later one."""

import ast
import pathlib

import pytest

import ldm_jax

ROOT = pathlib.Path(ldm_jax.__file__).parent
BASE = {"types", "errors", "random", "images"}
# What each part may import, besides itself.
ALLOWED = {
    "types": set(),
    "errors": set(),
    "random": {"types"},
    "images": {"types"},
    "config": {"errors"},
    "tensors": {"errors"},
    "cli": {"config", "errors", "training"},
    "data": BASE,
    "nn": BASE,
    "first_stage": BASE | {"nn"},
    "denoisers": BASE | {"nn"},
    "conditioners": BASE | {"nn"},
    "diffusion": BASE,
    "convert": BASE | {"first_stage", "denoisers", "nn"},
    "builders": BASE | {"config", "first_stage", "denoisers", "conditioners", "diffusion"},
}
ALLOWED["pipeline"] = ALLOWED["builders"] | {"builders", "training", "diffusion"}
ALLOWED["workdir"] = ALLOWED["pipeline"] | {"pipeline", "tensors"}
ALLOWED["training"] = ALLOWED["workdir"] | {"workdir", "data"}
ALLOWED["train"] = {"cli", "training"}
ALLOWED["sample"] = {"cli", "errors", "images", "workdir"}
ALLOWED["__init__"] = {"pipeline", "workdir"}


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
    extra = imported_parts(path) - ALLOWED[part] - {part}
    assert not extra, f"{path.relative_to(ROOT)} may not import {sorted(extra)}"
