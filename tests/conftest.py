"""Eight fake CPU devices, full float32 products and one compilation cache for the whole suite."""

import importlib
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from types import ModuleType

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Toy shapes take longer to compile than to run, so LLVM need not optimise. The processes that tests
# start inherit this.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest
from absl import flags

import ldm_jax
from ldm_jax import xla_flags

xla_flags.prefer_eigen()  # as the commands do
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")
CACHE = os.environ.get(
    "LDM_JAX_TEST_CACHE", str(pathlib.Path(tempfile.gettempdir()) / "ldm_jax_test_cache")
)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

GOLDEN = pathlib.Path(__file__).parent / "golden"


# Whole files go to one of two processes: the longest come first, so that both end together.
LONGEST = ("test_end_to_end.py", "test_fine_tuning.py", "test_configs.py", "test_unet.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def golden_dir() -> pathlib.Path:
    return GOLDEN


@pytest.fixture
def import_command() -> Iterator[Callable[[str], ModuleType]]:
    """Imports a command of the package with its flags; those of two cannot be in one process, and
    so all are forgotten before and afterwards."""
    known = flags.FLAGS
    # The flags of `cli` are defined once, when it is imported.
    owners = {name: known.find_module_defining_flag(name) or "" for name in known}
    ours = [n for n, o in owners.items() if o.startswith("ldm_jax.") and o != "ldm_jax.cli"]
    taken = {name: known[name] for name in ours}
    before = set(known) - set(ours)
    modules = {}

    def forget(name: str) -> ModuleType | None:
        vars(ldm_jax).pop(name.removeprefix("ldm_jax."), None)
        return sys.modules.pop(name, None)

    def load(name: str) -> ModuleType:
        for module in (name, "ldm_jax.sample_inputs"):
            modules.setdefault(module, forget(module))
        return importlib.import_module(name)

    for name in ours:
        delattr(known, name)
    yield load
    for name in set(known) - before:
        delattr(known, name)
    for name, flag in taken.items():
        known[name] = flag
        known.register_flag_by_module(owners[name], flag)
    for name, module in modules.items():
        forget(name)
        if module is not None:
            sys.modules[name] = module
            setattr(ldm_jax, name.removeprefix("ldm_jax."), module)
