"""What the command lines share: one clear line for bad input, and the exit codes."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from ml_collections import ConfigDict, config_flags

from ldm_jax import config as config_lib
from ldm_jax import distributed, watchdog, xla_flags
from ldm_jax.errors import Diverged, UserError
from ldm_jax.training import interrupt
from ldm_jax.training.interrupt import EXIT_PREEMPTED, Interrupted

EXIT_OK, EXIT_USER_ERROR, EXIT_DIVERGED, EXIT_PEER_DIED = 0, 1, 76, 77  # and EXIT_PREEMPTED

flags.DEFINE_bool("debug", False, "Show the traceback of an error.", allow_override=True)


def run(main: Callable[[], int | None], argv: Sequence[str] | None = None) -> None:
    """Parses flags, joins other hosts where the command has flags for that, runs `main` and exits.

    Exit codes: 0 done; 1 wrong input, said in one line on stderr; 75 stopped on request and
    resumable by the same command; 76 diverged, as the same command would again; 77 the
    process of another host has ended, or hangs, and the same command resumes.
    """
    xla_flags.prefer_eigen()
    argv = list(sys.argv if argv is None else argv)
    debug = any(arg.lstrip("-").lower() in ("debug", "debug=true", "debug=1") for arg in argv)
    try:
        if "--help" in argv or "-h" in argv:
            print(_help(main))
            raise SystemExit(EXIT_OK)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"unexpected argument '{rest[1]}': flags are written --name=value")
        _check_folders()
        distributed.initialize(argv)
        if listening := interrupt.of_command():
            listening.joined(others=distributed.joined())
        code = main() or EXIT_OK
    except Interrupted as stop:
        print(stop, flush=True)
        code = EXIT_PREEMPTED
    except Diverged as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_DIVERGED
    except Exception as error:
        # While flags are parsed, which also runs the config file, whatever is raised is about what
        # the user wrote. Later, only a UserError is; a bug of ours must keep its traceback.
        known = isinstance(error, (UserError, flags.Error)) or not flags.FLAGS.is_parsed()
        if debug or not known:
            traceback.print_exc()
        if known:
            print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        code = EXIT_USER_ERROR
        if not known and distributed.peer_died(error):
            watchdog.explain("the process of another host has ended")
            code = EXIT_PEER_DIED
    interrupt.end_listening()
    if code not in (EXIT_OK, EXIT_PREEMPTED) and distributed.joined():
        distributed.leave(code)
    distributed.finish(code)
    sys.exit(code)


def _check_folders() -> None:
    """Raises UserError for a folder that is no path, such as one of a bucket."""
    for name in ("workdir", "out"):
        given = flags.FLAGS[name].value if name in flags.FLAGS else None
        if given and (found := re.match(r"([a-z][a-z0-9+.-]+)://", given)):
            raise UserError(
                f"--{name}={given}: folders are read and written as paths; mount what is at "
                f"{found[1]}:// and give the path of that (docs/launch.md has gcsfuse)"
            )


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    if "Traceback" in text:  # absl quotes all of what a config file raised; its end says why
        where, text = text.partition(":")[0], text.strip().splitlines()[-1]
        text = f"{where}: {text}"
    # ml_collections lists every other key before it says which one was meant.
    text = re.sub(r"Other fields present: .*?}.", "", text.replace("\\n", " "), flags=re.DOTALL)
    text = " ".join(text.replace("\\", "").split())
    return text or type(error).__name__


def _help(main: Callable[[], int | None]) -> str:
    module = sys.modules[main.__module__]
    own, shared = (flags.FLAGS.module_help(m) for m in (module, sys.modules[__name__]))
    return f"{(module.__doc__ or '').strip()}\n\n{own}\n{shared}"


@contextlib.contextmanager
def writing(out: os.PathLike[str]) -> Iterator[None]:
    """Turns what the system says of files in the folder --out into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {out} ({error.strerror}): choose another --out"
        ) from error


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/ldm_jax, unless JAX_COMPILATION_CACHE_DIR says where."""
    import jax

    if not jax.config.jax_compilation_cache_dir:
        path = os.path.join(os.path.expanduser("~"), ".cache", "ldm_jax")
        jax.config.update("jax_compilation_cache_dir", path)


def define_config_flag() -> flags.FlagHolder:
    """Defines --config=FILE.py[:modern|smoke] with --config.a.b=value overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, e.g. configs/quickstart.py or configs/quickstart.py:smoke."
    )


def read_config(flag: flags.FlagHolder) -> ConfigDict:
    """Returns the checked config that the command line asks for, with its `name` set.

    Raises:
        UserError: no file given, no such file, or a config that cannot work.
    """
    if flags.FLAGS["config"].using_default_value:
        raise UserError("no config given: use --config=configs/quickstart.py")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    file, _, arg = path.partition(":")
    if not os.path.isfile(file):
        raise UserError(f"no config file {file}")
    value = flag.value
    if not isinstance(value, ConfigDict):
        raise UserError(f"{file} gave no config: its get_config(arg) must return a ConfigDict")
    name = os.path.splitext(os.path.basename(file))[0] + (
        f"-{arg.replace(',', '-')}" if arg else ""
    )
    if not value.get("name", ""):
        value.name = name
    return config_lib.check(value)
