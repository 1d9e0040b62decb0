"""Eight fake CPU devices, full float32 products and one compilation cache for the whole suite."""

import os
import pathlib
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Toy shapes take longer to compile than to run, so LLVM need not optimise. The processes that tests
# start inherit this.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

import jax
import pytest

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
