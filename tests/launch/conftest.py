"""Every test gets stand-ins of its own."""

import pathlib

import pytest

from launch.stubs import Stubs


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> Stubs:
    return Stubs(tmp_path)
