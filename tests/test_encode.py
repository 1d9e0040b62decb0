"""Latents that are stored once: what training makes of them, restarts, shares, and refusals."""

import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from commands import command

from configs import quickstart
from ldm_jax import config as config_lib
from ldm_jax import stored_latents
from ldm_jax import workdir as files
from ldm_jax.data.latents_index import read_index, write_index
from ldm_jax.data.latents_source import LatentsSource
from ldm_jax.data.pipeline import Batches
from ldm_jax.data.transforms import CachedTransform
from ldm_jax.errors import UserError
from ldm_jax.preflight import open_data, open_training_data
from ldm_jax.run import run
from ldm_jax.training import encoding, latents
from ldm_jax.training.encoding import Settings
from ldm_jax.training.interrupt import Interrupted
from ldm_jax.training.sharding import make_mesh
from ldm_jax.training.steps import diffusion_functions

FLOAT32 = Settings(dtype="float32", shards=3, batch_size=32)


def tiny_config(**changes):
    """A class-conditional model of 16x16 pixels and 8x8 latents of two channels."""
    c = config_lib.get_config()
    c.data.update(source="emoji", where="category=Smileys & Emotion", label="subcategory")
    c.data.update(resolution=16, threads=2, fields=("label",))
    c.first_stage.update(kind="kl", width=8, mult=(1,), depth=1, patch=2, norm_groups=8)
    c.first_stage.update(mid_attn=False, z_channels=2, channels=2, latent_scale="scalar")
    c.denoiser.update(kind="dit", width=32, depth=1, num_heads=2)
    c.conditioners = ("label",)
    c.label.update(num_classes=16, width=32, slot="vector")
    c.diffusion.predict = "v"
    c.cond_drop_rate = 0.1
    c.train.batch_size = 16
    c.update_from_flattened_dict(changes)
    return config_lib.check(c)


def random_like(tree, seed):
    noise = np.random.RandomState(seed)
    return jax.tree.map(lambda x: (0.3 * noise.standard_normal(x.shape)).astype(np.float32), tree)


def save_first_stage(folder, seed=0):
    config = tiny_config()
    variables = random_like(files.abstract_first_stage(config), seed)
    variables["latents"] = {"shift": np.zeros(2, np.float32), "scale": np.ones(2, np.float32)}
    files.save_first_stage(folder, config, variables)
    return str(folder)


@pytest.fixture(scope="module")
def first_stage(tmp_path_factory):
    return save_first_stage(tmp_path_factory.mktemp("first") / "stage")


def encode(config, folder, first_stage, settings=FLOAT32, check=lambda place: None, **options):
    source = open_data(config, folder)
    options = {"first_stage": first_stage} | options
    return stored_latents.encode_data(config, source, folder, settings, check, **options)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, first_stage):
    folder = tmp_path_factory.mktemp("stored") / "latents"
    encode(tiny_config(), folder, first_stage)
    return folder


def start(init):
    """A state with random weights: those of `init` would not show what the network reads."""
    state = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(init, jax.random.key(0))
    )
    return state.replace(params=jax.tree.map(lambda x: x / 3, random_like(state.params, 2)))


def train(state, step, frozen, source, transform, fields=("label",), count=12):
    """Losses of the first steps."""
    batches, losses = Batches(source, transform, batch_size=16, seed=0, fields=fields), []
    for i in range(count):
        state, metrics = step(state, frozen, batches.batch(i), jax.random.key(1))
        losses.append(float(metrics["loss"]))
    return np.array(losses)


def test_training_is_that_on_images_and_on_cached_moments(stored, first_stage):
    # 12 steps of 16 of the 166 images go beyond the first epoch.
    config = tiny_config()
    init, step = diffusion_functions(config)
    frozen = files.load_first_stage(stored, config)
    training, images = (start(init), jax.jit(step), frozen), open_data(config, stored)
    expected = train(*training, images, latents.task_transform(config))
    encoder = latents.encoder(config, frozen, make_mesh())
    cached = latents.encode_source(config, images, encoder, lambda: None)
    found = {"cached": train(*training, cached, CachedTransform())}
    config = tiny_config(**{"data.source": f"latents:{stored}"})
    source = open_training_data(config, stored)
    found["stored"] = train(*training, source, latents.task_transform(config))
    assert len(set(expected)) == 12
    assert np.ptp(expected) > 0.01 * np.mean(expected)
    for name, losses in found.items():  # the same numbers in programs of another shape
        np.testing.assert_allclose(losses, expected, rtol=2e-5, err_msg=name)


def test_the_scale_is_that_of_the_images(stored, first_stage, tmp_path):
    config = tiny_config(**{"data.source": f"latents:{stored}"})
    source = open_training_data(config, tmp_path)
    plain = files.load_first_stage(first_stage, config)
    found, record = stored_latents.scaled(config, plain, source)
    images = open_data(tiny_config(), tmp_path)
    expected, _ = latents.scaled(tiny_config(), plain, images, make_mesh(), lambda: None)
    assert record == json.loads((stored / "first_stage" / files.LATENTS).read_text())
    assert record["rule"] == "scalar" and record["images"] == 166
    np.testing.assert_allclose(found["latents"]["scale"], expected["latents"]["scale"], rtol=1e-6)
    assert not np.allclose(found["latents"]["scale"], 1, rtol=0.1)
    number = tiny_config(**{"first_stage.latent_scale": "0.5"})
    found, _ = stored_latents.scaled(number, plain, source)
    np.testing.assert_array_equal(found["latents"]["scale"], 0.5)


def test_float16_rounds_by_as_much_as_it_says(stored, first_stage, tmp_path):
    encode(tiny_config(), tmp_path / "half", first_stage, Settings())
    half, exact = LatentsSource(tmp_path / "half"), LatentsSource(stored)
    assert half.index.shards == 1 and half[7]["moments"].dtype == np.float16
    size = [sum(f.stat().st_size for f in s.folder.glob("shard*")) for s in (half, exact)]
    assert size[0] < 0.7 * size[1]
    for i in (0, 165):
        ours, theirs = half[i]["moments"].astype(np.float32), exact[i]["moments"]
        assert ours.shape == (2, 1, 8, 8, 4) and half[i]["label"] == exact[i]["label"]
        assert (ours != theirs).any()
        np.testing.assert_allclose(ours, theirs, rtol=2**-11, atol=2**-24)


def test_a_killed_run_goes_on_with_its_shards(stored, first_stage, tmp_path):
    folder, seen = tmp_path / "latents", []

    def stop(place):
        seen.append(place)
        if (folder / "shard-00001-of-00003.arrayrecord.tmp").exists() and len(seen) > 90:
            raise Interrupted(place)

    with pytest.raises(Interrupted):
        encode(tiny_config(), folder, first_stage, check=stop)
    kept = folder / "shard-00000-of-00003.arrayrecord"
    left = folder / "shard-00001-of-00003.arrayrecord.tmp"
    assert left.exists() and not left.with_suffix("").exists()
    left.write_bytes(left.read_bytes()[:1000])  # as after a kill: without its end
    with pytest.raises(UserError, match=r"shard-00001-of-00003\.arrayrecord is missing: run"):
        LatentsSource(folder)
    before = kept.stat()
    encode(tiny_config(), folder, first_stage)
    assert kept.stat() == before and not list(folder.glob("*.tmp"))
    ours, theirs = LatentsSource(folder), LatentsSource(stored)
    for i in range(len(theirs)):
        for name, array in theirs[i].items():
            np.testing.assert_array_equal(ours[i][name], array)


def test_a_full_disk_is_said_in_one_line(first_stage, tmp_path):
    (tmp_path / "shard-00001-of-00003.arrayrecord.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot write .*00001.*\.tmp: .*No space left on device"):
        encode(tiny_config(), tmp_path, first_stage)


def test_processes_share_the_work(stored, first_stage, tmp_path):
    index = read_index(stored)
    for count in (1, 2, 3, 5):
        shares = [
            encoding.my_shards(index, FLOAT32._replace(process_index=i, process_count=count))
            for i in range(count)
        ]
        assert sorted(shard for share in shares for shard in share) == [0, 1, 2]
    assert [i for shard in range(3) for i in index.rows(shard)] == list(range(166))
    folder = tmp_path / "latents"
    second = FLOAT32._replace(process_index=1, process_count=2)
    encode(tiny_config(), folder, first_stage, second)
    assert [path.name[:11] for path in folder.glob("shard*")] == ["shard-00001"]
    encode(tiny_config(), folder, first_stage, second._replace(process_index=0))
    assert read_index(folder) == index
    for i in (0, 60, 120, 165):
        np.testing.assert_array_equal(
            LatentsSource(folder)[i]["moments"], LatentsSource(stored)[i]["moments"]
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.resolution": 32}, r"other latents .*data\.resolution: 16 -> 32"),
        ({"data.flip": False}, r"other latents \("),
        ({"data.fields": (), "conditioners": (), "cond_drop_rate": 0.0}, "other latents"),
        ({"data.where": "category=Activities"}, "other latents"),
    ],
)
def test_a_folder_of_other_latents_is_refused(change, message, stored, first_stage):
    with pytest.raises(UserError, match=message):
        encode(tiny_config(**change), stored, first_stage)


def test_another_first_stage_or_type_is_refused(stored, tmp_path):
    other = save_first_stage(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"other latents \(the first_stage: "):
        encode(tiny_config(), stored, other)
    with pytest.raises(UserError, match="other latents"):
        encode(tiny_config(), stored, stored, FLOAT32._replace(dtype="bfloat16"))
    with pytest.raises(UserError, match="no first stage to encode with: give --workdir"):
        encode(tiny_config(), tmp_path / "new", "")
    config = tiny_config(**{"data.source": f"latents:{stored}", "first_stage.weights": other})
    with pytest.raises(UserError, match=r"not the one that made the latents in .*same folder"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    # Nor may a run that was begun with another go on.
    save_first_stage(tmp_path / "run" / "first_stage", seed=1)
    with pytest.raises(UserError, match="is not the one that made the latents"):
        run(tiny_config(**{"data.source": f"latents:{stored}"}), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.resolution": 32}, r"data\.resolution is 32, but the latents in .* with 16: use"),
        ({"data.crop": "random"}, r"data\.crop is 'random', but .* with 'center'"),
        ({"data.where": ""}, r"data\.where is '', but .* with 'category=Smileys & Emotion'"),
        ({"data.label": "category"}, r"data\.label is 'category', but"),
        ({"label.num_classes": 3}, r"num_classes is 3: set it to 16"),
        (
            {"data.fields": ("label", "low_res"), "conditioners": ("label", "low_res")}
            | {"cond_drop_rate": 0.0},
            "lack the field 'low_res'; they have: label",
        ),
        ({"data.cache_latents": True}, "cache_latents is for images"),
        ({"sample.nearest": True}, "nearest compares images"),
        ({"first_stage.width": 16}, r"first_stage\.width is 16, but the first stage in"),
        ({"first_stage.latent_scale": "channel"}, "was made by 'scalar', and there are no images"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(change, message, stored, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        run(tiny_config(**{"data.source": f"latents:{stored}"} | change), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_unmirrored_latents_are_refused_where_flips_are_asked_for(first_stage, tmp_path):
    folder = tmp_path / "latents"
    encode(tiny_config(**{"data.flip": False}), folder, first_stage)
    config = tiny_config(**{"data.source": f"latents:{folder}"})
    with pytest.raises(UserError, match=r"no mirrored images: set config\.data\.flip=False"):
        open_training_data(config, tmp_path)
    assert LatentsSource(folder)[0]["moments"].shape == (1, 1, 8, 8, 4)


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"crops": 4}, {}, "--crops needs config.data.crop='random'"),
        ({"dtype": "int8"}, {}, "--dtype is 'int8': choose from float16, bfloat16, float32"),
        ({"shards": 999}, {}, "--shards is 999, but there are 166 images"),
        (
            {},
            {"data.fields": ("masked_image", "mask"), "conditioners": ("inpainting",)},
            "the field 'masked_image' cannot be stored: its holes are drawn anew",
        ),
        (
            {},
            {"data.fields": ("low_res",), "conditioners": ("low_res",)}
            | {"data.low_res.degradation": "bsr", "data.low_res.factor": 2},
            "'low_res' cannot be stored: .*is 'bsr', which is drawn anew",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(settings, change, message, first_stage, tmp_path):
    change = {"cond_drop_rate": 0.0} | change
    with pytest.raises(UserError, match=message):
        encode(tiny_config(**change), tmp_path / "x", first_stage, FLOAT32._replace(**settings))


def test_damaged_folders_are_refused(stored, tmp_path):
    folder = pathlib.Path(shutil.copytree(stored, tmp_path / "latents"))
    shard = folder / "shard-00002-of-00003.arrayrecord"
    content = shard.read_bytes()
    for cut in (0, 1000, len(content) // 2, len(content) - 9):
        shard.write_bytes(content[:cut])
        with pytest.raises(
            UserError, match=r"shard-00002-of-00003\.arrayrecord is truncated: remo"
        ):
            LatentsSource(folder)
    shutil.copyfile(folder / "shard-00001-of-00003.arrayrecord", shard)
    with pytest.raises(UserError, match="has 55 records in place of 56"):
        LatentsSource(folder)
    shard.write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"version": 2}))
    with pytest.raises(UserError, match="has the version 2 of the format, but this ldm_jax read"):
        LatentsSource(folder)
    for text in ("{", "[]", "{}", json.dumps({"version": 1}), json.dumps(index | {"arrays": 3})):
        (folder / "index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json is damaged: encode"):
            LatentsSource(folder)
    (folder / "index.json").unlink()
    with pytest.raises(UserError, match=r"no stored latents in .*: make them with `python -m"):
        LatentsSource(folder)
    write_index(folder, dataclasses.replace(read_index(stored), shards=2))
    with pytest.raises(UserError, match=r"of-00002\.arrayrecord is missing"):
        LatentsSource(folder)


def test_latents_are_no_images(stored, tmp_path):
    with pytest.raises(UserError, match=r"holds latents to train on.*they are in 'emoji'"):
        open_data(tiny_config(**{"data.source": f"latents:{stored}"}), tmp_path)


def test_the_command_line_encodes_and_goes_on(tmp_path):
    config = quickstart.get_config("smoke")
    variables = random_like(files.abstract_first_stage(config), 0)
    files.save_first_stage(tmp_path / "stage", config, variables)
    root = pathlib.Path(quickstart.__file__).parent
    flags = [f"--config={root / 'quickstart.py'}:smoke", f"--out={tmp_path / 'out'}"]
    flags += ["--config.first_stage.latent_scale=stored", "--shards=2"]
    flags += [f"--first_stage={tmp_path / 'stage'}"]
    found = command("encode", *flags)
    assert "166 of 166 images are in 2 of 2 shards" in found.stdout, found.stderr
    assert f"--config.data.source=latents:{tmp_path / 'out'}" in found.stdout
    source = LatentsSource(tmp_path / "out")
    assert source.index.fields == ("label",) and source[165]["moments"].dtype == np.float16
    found = command("encode", *flags, "--crops=2", check=False)
    assert found.returncode == 1 and found.stderr.startswith("error: --crops needs config.data.cr")
