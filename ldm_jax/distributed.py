"""Several hosts that run one command together, each in a process of its own.

Every host starts the same command. On Cloud TPU and SLURM they find each other; elsewhere each is
told --coordinator=HOST:PORT (of process 0), --num_processes=N and --process_id=I. Process 0 alone
prints and writes files, but for checkpoints, of which each writes its part to the same folder.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib.util
import math
import os
import pathlib
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence

from absl import flags

from ldm_jax import watchdog
from ldm_jax.errors import UserError

_FLAGS = ("coordinator", "num_processes", "process_id")
HANG_TIMEOUT = 300.0  # seconds, of several hosts
_TEXT = 1024  # bytes of a text that hosts tell each other
# What collectives say whose peer is gone.
_GONE = re.compile(
    r"gloo|connection (closed|reset|refused)|heartbeat|coordination|unavailable|socket closed"
    r"|deadline.exceeded|barrier",
    re.IGNORECASE,
)


def define_flags() -> None:
    """Defines the flags of commands that several hosts can run together."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where hosts are not on a pod.")
    flags.DEFINE_integer("num_processes", None, "How many processes there are, one per host.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_float(
        "hang_timeout",
        None,
        "Seconds that a host may be silent, and a step of training may take, before all end with "
        f"exit code 77. Default: {HANG_TIMEOUT:.0f} of several hosts; one alone waits for ever.",
    )


def initialize(argv: Sequence[str]) -> None:
    """Joins the other hosts, if there are any, before any use of devices.

    `argv` is the command line, which must be the same on all, as must the package's source.

    Raises:
        UserError: flags that do not fit, hosts that do not find each other, or one that differs.
    """
    given = {name: flags.FLAGS[name].value for name in _FLAGS if name in flags.FLAGS}
    if not given:
        return
    allowed = flags.FLAGS["hang_timeout"].value
    if allowed is not None and not 1 <= allowed < 1e8:
        raise UserError(f"--hang_timeout is {allowed:g}, but must be at least 1 second")
    named = [name for name in _FLAGS if given[name] not in ("", None)]
    if named and len(named) < len(_FLAGS):
        raise UserError("give --coordinator, --num_processes and --process_id together")
    if named:
        count, index = given["num_processes"], given["process_id"]
        if count < 1 or not 0 <= index < count:
            raise UserError(
                f"--process_id={index} must be from 0 to --num_processes={count}, less 1"
            )
        if not re.fullmatch(r".+:\d+", given["coordinator"]):
            raise UserError(f"--coordinator={given['coordinator']} must be HOST:PORT")
    if not named and not _on_pod():
        if allowed:
            watchdog.start(allowed)
        return
    allowed = allowed or HANG_TIMEOUT
    import jax

    # Of CPUs, which may be what there is. Collectives of two of their programs at a time would be
    # taken for each other's.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM from processes that have nothing to save yet.
    jax.config.update("jax_enable_preemption_service", False)
    found = (given["coordinator"], given["num_processes"], given["process_id"]) if named else ()
    try:
        jax.distributed.initialize(
            *found,
            # Later than the watchdog: jax aborts, with an exit code that means a bug. Who is done
            # waits for the others, who may be slow.
            heartbeat_timeout_seconds=math.ceil(4 * allowed) + 60,
            shutdown_timeout_seconds=math.ceil(watchdog.SLOW * allowed),
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the hosts did not find each other: {reason}") from error
    from jax._src.distributed import global_state  # as orbax does: its store has no public name

    watchdog.start(
        allowed, global_state.client, global_state.process_id, global_state.num_processes
    )
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w")  # process 0 says it
    check_same({"the command line": _shared(argv), "the source of ldm_jax": _source()})


def _shared(argv: Sequence[str]) -> str:
    """A command line without what says which of the processes this is."""
    kept, words = [], iter(argv[1:])
    for word in words:
        name, equals, _ = word.lstrip("-").partition("=")
        if name not in _FLAGS:
            kept.append(word)
        elif not equals:
            next(words, None)  # its value
    return " ".join(kept)


def is_main() -> bool:
    """Tells whether this process prints and writes files."""
    import jax

    return jax.process_index() == 0


def joined() -> bool:
    """Tells whether `initialize` has joined other processes."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


def in_use() -> bool:
    """Tells whether there are other processes."""
    import jax

    return joined() and jax.process_count() > 1


def peer_died(error: BaseException) -> bool:
    """Tells whether an error is one of collectives with a process that is gone."""
    import jax

    if not in_use():
        return False
    while error is not None:  # closing a checkpoint may fail on top of it
        if isinstance(error, jax.errors.JaxRuntimeError) and _GONE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_same(texts: Mapping[str, str]) -> None:
    """Compares texts, by what they are of, between all hosts; all must call it.

    Raises:
        UserError: on every host, if one has another text than most.
    """
    if not in_use():
        return
    digests = {what: hashlib.sha256(text.encode()).hexdigest() for what, text in texts.items()}
    rows = [row.split() for row in _gather(" ".join([*digests.values(), socket.gethostname()]))]
    for place, what in enumerate(digests):
        # Of equally many, those of process 0 come first.
        usual = collections.Counter(row[place] for row in rows).most_common(1)[0][0]
        odd = [f"{i} ({row[-1]})" for i, row in enumerate(rows) if row[place] != usual]
        if odd:
            raise UserError(
                f"{what} differs on process {', '.join(odd)}: all {len(rows)} processes need the "
                "same"
            )


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """What one host refuses within, all refuse, so that none waits for it; all must enter."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    refusals = _gather(f"{error}" or type(error).__name__ if error else "") if in_use() else []
    if error:
        raise error
    for index, refusal in enumerate(refusals):
        if refusal:
            raise UserError(f"process {index}: {refusal}")


def any_host(flag: bool) -> bool:
    """Whether `flag` is set on any host; all must call it, and wait for each other."""
    if in_use():
        flag = "1" in _gather("1" if flag else "0")
    watchdog.beat()
    return flag


def most(number: int) -> int:
    """The largest of all hosts' numbers; all must call it, and wait for each other."""
    return max(map(int, _gather(str(number)))) if in_use() else number


def finish(code: int) -> None:
    """Waits until all others are done as well, unless they die: the exit code is settled."""
    watching = watchdog.current()
    if watching:
        watching.finish(code)
    if joined():
        import jax

        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
    if watching:
        watching.stop()


def leave(code: int) -> None:
    """Ends the process without waiting for others, which may wait for this one; they are told."""
    if watching := watchdog.current():
        watching.depart(code)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _gather(text: str) -> list[str]:
    """The texts of all processes, in order."""
    import numpy as np
    from jax.experimental import multihost_utils

    padded = text.encode()[:_TEXT].ljust(_TEXT, b"\0")
    rows = multihost_utils.process_allgather(np.frombuffer(padded, np.uint8))
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def _source() -> str:
    """The package's source, file after file."""
    root = pathlib.Path(__file__).parent
    paths = sorted(root.rglob("*.py"))
    return "".join(f"{p.relative_to(root)}\n{p.read_text(encoding='utf-8')}" for p in paths)


def _on_pod() -> bool:
    """Tells whether this is a TPU VM, or one of several tasks of a SLURM step."""
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return True
    if os.environ.get("JAX_PLATFORMS", "tpu") != "tpu" or not importlib.util.find_spec("libtpu"):
        return False
    if "TPU_WORKER_HOSTNAMES" in os.environ:  # set by GKE
        return "," in os.environ["TPU_WORKER_HOSTNAMES"]
    devices = pathlib.Path("/dev")
    return any(devices.glob("accel[0-9]*")) or any(devices.glob("vfio/[0-9]*"))
