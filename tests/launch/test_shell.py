import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from launch.stubs import LAUNCH, Stubs

SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
USED = [name for name in SCRIPTS if name not in ("common.sh", "worker.sh")]


def test_shellcheck_finds_nothing() -> None:
    beside = pathlib.Path(sys.executable).with_name("shellcheck")  # where pip puts it
    program = shutil.which("shellcheck") or (str(beside) if beside.exists() else None)
    if program is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[test]'")
    result = subprocess.run(
        [program, "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS, "slurm.sbatch"],
        cwd=LAUNCH,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", USED)
def test_help_names_every_flag(stubs: Stubs, script: str) -> None:
    result = stubs.run(script, "--help")
    assert result.returncode == 0 and stubs.calls() == []
    taken = set(re.findall(r"^ +(--\w+)=?\*?\)", (LAUNCH / script).read_text(), re.MULTILINE))
    taken -= {"--help"}
    assert len(taken) > 5
    assert taken == {flag for flag in taken if flag in result.stdout}
    assert "set -euo pipefail" in (LAUNCH / script).read_text()
    assert os.access(LAUNCH / script, os.X_OK)


def test_only_interruptions_allow_a_restart() -> None:
    script = "source launch/common.sh; for c in {0..255}; do may_restart $c && echo $c; done; true"
    result = subprocess.run(
        ["bash", "-c", script], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert result.stdout.split() == ["75", "77"]


def test_quoted_words_are_read_back() -> None:
    words = ["a", "", "a b", "it's", '$HOME `x` \\ " * ~ # ;', "two\nlines", "--x=é", "'", "!"]
    script = 'source launch/common.sh; eval "set -- $(quote "$@")"; printf "%s\\0" "$@"'
    result = subprocess.run(
        ["bash", "-c", script, "bash", *words], cwd=LAUNCH.parent, capture_output=True, text=True
    )
    assert result.stdout.split("\0")[:-1] == words
