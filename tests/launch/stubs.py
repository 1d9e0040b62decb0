"""Runs the launch scripts against programs that only record how they were called."""

import os
import pathlib
import shlex
import subprocess
import time

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
PROGRAMS = ("gcloud", "kubectl", "sbatch", "scontrol", "srun", "tmux", "python")
PROGRAMS += ("tar", "uv", "curl", "sudo", "mountpoint", "gcsfuse")

# Each call is kept. What it answers and its exit code come from the next line of the file that is
# named after the kind of call, 'CODE ANSWER', with | for a new line; the last one is for all that
# follow. Without a file it is 0 and nothing.
STUB = r"""#!/bin/bash
name=${0##*/}
{ printf '%s' "$name"; printf '\x1f%s' "$@"; printf '\x1e'; } >>"$STUBS/calls"
case "$name $*" in
    gcloud*"queued-resources describe"*) name=queue ;;
    gcloud*"tpu-vm describe"*) name=node ;;
    gcloud*"worker.sh state"*) name=workers ;;
    gcloud*"worker.sh setup"*) name=setup ;;
    gcloud*"worker.sh start"*) name=start ;;
    gcloud*" create "*) name=create ;;
    gcloud*" scp "*) name=scp ;;
    tmux\ has-session*) name=session ;;
    kubectl*" apply "*) cat >"$STUBS/stdin" ;;
esac
[[ -f $STUBS/$name ]] || exit 0
read -r line <"$STUBS/$name"
rest=$(tail -n +2 "$STUBS/$name")
if [[ -n $rest ]]; then printf '%s\n' "$rest" >"$STUBS/$name"; fi
read -r code answer <<<"$line"
if [[ $code != 0 ]]; then exec >&2; fi
if [[ -n $answer ]]; then printf '%s\n' "${answer//|/$'\n'}"; fi
exit "$code"
"""


class Stubs:
    """A folder with stand-ins for the programs that the scripts call, first on the PATH."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.home = folder / "home"
        self.home.mkdir()
        (folder / "bin").mkdir()
        for program in PROGRAMS:
            self.write(program, STUB)

    def write(self, program: str, text: str) -> None:
        """Makes a stand-in do something else."""
        path = self.folder / "bin" / program
        path.write_text(text)
        path.chmod(0o755)

    def answer(self, kind: str, *lines: str) -> None:
        """Sets what calls of a kind answer, one after the other: 'CODE TEXT'."""
        (self.folder / kind).write_text("".join(line + "\n" for line in lines))

    def environment(self, **more: str) -> dict[str, str]:
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        own = {"STUBS": str(self.folder), "HOME": str(self.home), "PATH": path}
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "XDG"))}
        return kept | own | more

    def run(self, script: str, *args: str, **environment: str) -> subprocess.CompletedProcess:
        """Runs a launch script from the repository's root."""
        return subprocess.run(
            ["bash", str(LAUNCH / script), *args],
            cwd=LAUNCH.parent,
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        """All calls so far, each as its program and arguments; forgets them."""
        path = self.folder / "calls"
        if not path.exists():
            return []
        text = path.read_text()
        path.unlink()
        return [call.split("\x1f") for call in text.split("\x1e")[:-1]]


def printed(output: str) -> list[list[str]]:
    """The commands that a dry run prints, split as a shell splits them."""
    commands, lines = [], ""
    for line in output.splitlines(keepends=True):
        lines += line
        try:
            commands.append(shlex.split(lines))
        except ValueError:  # a quotation goes on in the next line
            continue
        lines = ""
    assert not lines
    return commands


# A trainer that saves on SIGTERM.
TRAINER = """#!/bin/bash
trap 'exit 75' TERM
touch "$STUBS/ready"
while :; do sleep 0.02; done
"""


def wait_for(path: pathlib.Path) -> None:
    """Waits until a file is there."""
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
