"""Signals to real processes; those of whole commands are in tests/test_signals.py."""

import signal
import subprocess
import sys
import time

import pytest

from ldm_jax.training.interrupt import Interrupted, Interrupts, of_command

LISTEN = """
import hashlib, os, signal, sys, time
from ldm_jax.training import interrupt
interrupt.listen()
it = interrupt.of_command()
it.leaving = lambda: print("left", flush=True)
def compute():  # no Python code runs, and no signal is handled, before it ends
    print("computing", flush=True)
    hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
"""


def start(code):
    return subprocess.Popen(
        [sys.executable, "-c", LISTEN + code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_ends_at_once_where_nothing_is_unsaved(number):
    process = start("it.joined(others=False)\ncompute()")
    assert process.stdout.readline() == "computing\n"
    begin = time.perf_counter()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    print(f"{time.perf_counter() - begin:.3f} s")
    assert (process.returncode, out, err) == (75, "left\n", f"\n{number.name}: stopping ...\n")


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ("it.joined(others=False); it.unsaved = True", "saving after the step in progress"),
        ("it.joined(others=True)", "stopping"),
        ("", "stopping"),  # it is not known yet
    ],
)
def test_a_command_goes_on_where_something_is_or_others_wait(state, what):
    code = """
print("ready", flush=True)
while not it.requested:
    time.sleep(0.01)
print("ready", flush=True)
time.sleep(1)
interrupt.end_listening()
print("ready", flush=True)
time.sleep(1)
sys.exit(75)
"""
    process = start(f"{state}\n{code}")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):  # the last one as it ends
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (75, "", f"\nSIGTERM: {what} ...\n")


def test_a_signal_before_it_is_known_whether_others_wait():
    process = start(
        "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(0.1)\n"
        "try:\n    it.joined(others=False)\n"
        "except interrupt.Interrupted as stop:\n    print(stop)"
    )
    assert "the same command begins again" in process.communicate(timeout=120)[0]


def test_a_library_raises_a_flag_and_puts_the_handlers_back():
    before = signal.getsignal(signal.SIGTERM)
    assert of_command() is None
    with Interrupts() as interrupts:
        interrupts.check("here")
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert interrupts.requested
        with pytest.raises(Interrupted, match="stopped here; the same command goes on"):
            interrupts.check("here")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_saved_within_is_unsaved_again_afterwards():
    interrupts = Interrupts()
    interrupts.unsaved = True
    with pytest.raises(Interrupted), interrupts.saved():
        assert not interrupts.unsaved
        raise Interrupted
    assert interrupts.unsaved
