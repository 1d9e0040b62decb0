import itertools
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.data.device import to_device
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.errors import UserError

from .helpers import Numbers, assert_threads_end


@pytest.fixture
def sharding():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def count(limit=None):
    for i in itertools.count() if limit is None else range(limit):
        yield {"image": np.full((8, 2, 2, 3), i % 256, np.uint8), "index": np.full(8, i, np.int32)}


def assert_thread_ends():
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if not [t for t in threading.enumerate() if t.name == "ldm-to-device"]:
            return
        time.sleep(0.01)
    raise AssertionError("the thread is still running")


def test_batches_arrive_in_order_as_global_arrays(sharding):
    seen = list(to_device(count(5), sharding))
    assert [int(batch["index"][0]) for batch in seen] == list(range(5))
    image = seen[3]["image"]
    assert image.shape == (8, 2, 2, 3) and image.dtype == np.uint8 and image.sharding == sharding
    np.testing.assert_array_equal(image, np.full((8, 2, 2, 3), 3))
    assert_thread_ends()


def test_it_stays_exhausted_and_close_is_idempotent(sharding):
    batches = to_device(count(1), sharding)
    assert len(list(batches)) == 1
    with pytest.raises(StopIteration):
        next(batches)
    batches.close()
    batches.close()


def test_runs_at_most_size_ahead(sharding):
    made = []

    def counted():
        for batch in count():
            made.append(batch)
            yield batch

    with to_device(counted(), sharding, size=2) as batches:
        next(batches)
        time.sleep(0.3)
        # one taken, two waiting, one in the hands of the thread
        assert len(made) == 4
    assert_thread_ends()


def test_wait_seconds_is_the_time_without_data(sharding):
    def slow():
        for batch in count(4):
            time.sleep(0.1)
            yield batch

    starved = to_device(slow(), sharding)
    list(starved)
    assert 0.3 < starved.wait_seconds < 2
    fed = to_device(count(4), sharding)
    next(fed)
    time.sleep(0.5)
    before = fed.wait_seconds
    next(fed)
    assert fed.wait_seconds - before < 0.05
    fed.close()


def test_an_error_reaches_the_consumer(sharding):
    source = Numbers(64, broken=9)
    batches = to_device(Batches(source, ImageTransform(4), batch_size=8, seed=0), sharding)
    with pytest.raises(UserError, match="cannot decode the image number 9"):
        for _ in range(20):
            next(batches)
    with pytest.raises(StopIteration):
        next(batches)
    assert_thread_ends()
    assert_threads_end()


def test_threads_end_when_the_consumer_stops(sharding):
    loader = Batches(Numbers(64), ImageTransform(4), batch_size=8, seed=0)
    with to_device(loader, sharding) as batches:
        next(batches)
    assert_thread_ends()
    assert_threads_end()
    dropped = to_device(loader, sharding)
    next(dropped)
    del dropped
    assert_thread_ends()
    assert_threads_end()


def test_the_interpreter_exits_without_a_close():
    code = """
import jax
from ldm_jax.data.device import to_device
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.transforms import ImageTransform
from ldm_jax.data.sources import open_source
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
loader = Batches(open_source("emoji"), ImageTransform(64), batch_size=8, seed=0)
batches = to_device(loader, sharding)
next(batches)
print("done")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")
