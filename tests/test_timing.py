"""How calls are timed, and random arrays in the place of abstract ones."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from ldm_jax import stand_ins, timing
from ldm_jax.training.sharding import make_mesh, replicated


def test_throughput_counts_what_comes_after_the_warm_up():
    taken = []

    def batches():
        while True:
            time.sleep(0.3 if len(taken) < 2 else 0.01)
            taken.append(0)
            yield {}

    found = timing.throughput(batches(), 32, 0.2, warm_up=2)
    # A batch takes 10 ms or, on a busy machine, more: with the slow ones it would be below 1000.
    count = len(taken) - 2
    assert 1 <= count <= 20
    assert 0 < found["images_per_second"] <= 32 / 0.01
    assert found["images_per_second"] <= 32 * count / 0.2
    assert found["slowest_batch_ms"] >= 10
    assert (
        timing.throughput(batches(), 32, 1e-9, warm_up=0)["images_per_second"] > 0
    )  # at least one


def test_call_times_leave_out_the_first_call():
    called = []

    def call():
        called.append(0)
        time.sleep(0.5 if len(called) == 1 else 0.01)

    times = timing.call_times(call, 0.05)
    assert len(called) == len(times) + 1 and len(times) >= 3
    assert 0.01 <= min(times) < 0.5 and sum(times) >= 0.05
    called.clear()
    assert len(timing.call_times(call, 0.0, least=2, ahead=1)) == 2
    assert len(called) == 4  # the first one, two that count, and one more that was sent


def test_summary():
    found = timing.summary([0.1, 0.2, 0.3, 0.4, 5.0], images=6)
    want = {"median_ms": 300, "low_ms": 200, "high_ms": 400, "images_per_second": 20}
    assert found.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12)  # rounding in float64


def test_matrix_peak_is_a_rate_that_products_reach(monkeypatch):
    monkeypatch.setattr(timing, "LARGEST", 1024)
    device = jax.devices()[:1]
    peak = timing.matrix_peak("float32", device, tries=2)
    x = jax.device_put(jnp.ones((1024, 1024)), device[0])
    product = jax.jit(jnp.matmul)
    seconds = min(timing.call_times(lambda: product(x, x), 0.0, least=5))
    # Of the same order, however busy the machine is.
    assert 0.05 < peak / (2 * 1024**3 / seconds) < 20


def test_random_variables_keep_the_size_of_what_passes():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.LayerNorm()(nn.Conv(64, (3, 3))(x))
            return nn.Dense(64)(x)

    module = Network()
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 8, 64)))
    variables = stand_ins.random_variables(abstract)
    same = jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), abstract, variables)
    assert all(jax.tree.leaves(same))
    params = variables["params"]
    assert (params["LayerNorm_0"]["scale"] == 1).all() and (params["Conv_0"]["bias"] == 0).all()
    x = np.random.default_rng(0).standard_normal((1, 8, 8, 64), np.float32)
    assert 0.5 < float(jnp.std(jax.jit(module.apply)(variables, x))) < 2


def test_random_inputs_have_types_and_places():
    place = replicated(make_mesh())
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = {"image": jnp.uint8, "label": jnp.int32, "noise": jnp.bfloat16, "key": key.dtype}
    abstract = {
        name: jax.ShapeDtypeStruct(() if name == "key" else (64,), dtype, sharding=place)
        for name, dtype in shapes.items()
    }
    made = stand_ins.random_inputs(abstract)
    assert stand_ins.specs(made) == abstract
    assert len(set(made["image"].tolist())) > 20 and (made["label"] == 0).all()
    assert 0.5 < float(jnp.std(made["noise"].astype(jnp.float32))) < 2
