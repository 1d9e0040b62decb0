"""The compiler's options are added once, and never against what is given."""

import os

import pytest

from ldm_jax import xla_flags


@pytest.mark.parametrize(
    ("given", "release", "after"),
    [
        ("", "0.10.2", f"{xla_flags.YNN}="),
        ("--xla_a=1", "0.12.0", f"--xla_a=1 {xla_flags.YNN}="),
        (f"{xla_flags.YNN}=1", "0.10.2", f"{xla_flags.YNN}=1"),
        ("", "0.13.0", ""),  # which may not know it, and would end
    ],
)
def test_flags(given, release, after, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr(xla_flags.importlib.metadata, "version", lambda name: release)
    xla_flags.prefer_eigen()
    xla_flags.prefer_eigen()
    assert os.environ["XLA_FLAGS"] == after
