"""A trained model in use: from seeds and conditions to pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ldm_jax import arguments, builders, images, random
from ldm_jax import config as config_lib
from ldm_jax import pipeline_conditions as conditions
from ldm_jax.arguments import check_pixels, check_seeds
from ldm_jax.autoguidance import weak_fields
from ldm_jax.batches import in_batches
from ldm_jax.diffusion import samplers
from ldm_jax.errors import UserError
from ldm_jax.first_stage.tiled import Memory, Progress, TiledFirstStage, check_sides
from ldm_jax.networks import Networks, jitted
from ldm_jax.sampling_memory import sampling_memory
from ldm_jax.training.sharding import make_mesh, put, state_shardings
from ldm_jax.types import Array, Condition

# What works without a part, or how to get it.
MISSING = {
    "denoiser": "it can encode and decode, but not sample",
    "conditioner": "give `denoise` a Condition, or import the whole model",
    "first_stage": "it has latents only (decode=False); import the whole model for images",
}


class Pipeline:
    """A first stage, a denoiser and a conditioner with their weights.

    Attributes:
        config: the locked config of the run.
        variables: {'first_stage': variables, 'denoiser': params, 'conditioner': params,
            'classifier': params}, or those of them that the model has; a first stage on its own
            can encode and decode.
        step: of the checkpoint, in updates.
        label_names: names of the classes, or None where classes have only numbers.
        tokenizer: list of B captions -> (B, L) int32 tokens, or None where there is none.
        mesh: of devices, along whose batch axes images are made together. By default all devices,
            each with all weights; they are split as in training on one with other axes.
    """

    def __init__(
        self,
        config: ConfigDict,
        variables: dict[str, Any],
        step: int,
        label_names: Sequence[str] | None = None,
        tokenizer: Callable[[list[str]], np.ndarray] | None = None,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        self.config, self.step, self.label_names = config, step, label_names
        self.tokenizer = tokenizer
        self.mesh = make_mesh() if mesh is None else mesh
        self.variables = put(variables, state_shardings(variables, self.mesh))
        self._networks = Networks(config)
        self._jit = jitted(self._networks)
        self._schedule = builders.build_schedule(config)
        self._tiled = TiledFirstStage(
            self._jit["encode"],
            self._jit["decode"],
            config_lib.downsampling(config),
            config_lib.latent_channels(config),
        )

    # -- sampling -------------------------------------------------------------------------------

    def sample(
        self,
        seeds: Sequence[int],
        condition: Mapping[str, Any] | None = None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        spacing: str | None = None,
        batch_size: int | None = None,
        noise: Any | None = None,
        negative: Mapping[str, Any] | None = None,
        also: Sequence[tuple[Mapping[str, Any], float]] = (),
        weak: Pipeline | None = None,
        classifier_scale: float = 0.0,
        two_calls: bool | None = None,
        init_image: Any | None = None,
        strength: float = 1.0,
        image: Any | None = None,
        hole: Any | None = None,
        resample: tuple[int, int] = (1, 1),
        grey: Any | None = None,
        noise_level: float | None = None,
        size: tuple[int, int] | None = None,
        tile: int | None = None,
        measured: Callable[[Memory], None] | None = None,
        decode: bool = True,
    ) -> np.ndarray:
        """Makes one image per seed; image i depends on seed i and its condition alone.

        Settings that are not given come from `config.sample`.

        Args:
            seeds: B integers in [0, 2**32).
            condition: batch fields, e.g. {'label': [3, 3, 5]} or {'text': ['a cat', ...]}, B
                values each; None samples with the null condition of a conditional model.
            sampler: a key of `diffusion.samplers.SAMPLERS`.
            steps: 1 to T; also the network calls, but for plms (1 more) and heun (twice, less 1).
            eta: 0 (deterministic) to 1 for ddim; other samplers know only one value.
            guidance_scale: by how much guidance leads away from the null condition, or from
                `weak`; 1 = off, as it is by default where there is nothing to guide.
            guidance_rescale: see `Guidance`; 0 = off.
            guidance_interval: shares of the time range with guidance; (0, 1) is all of it.
            spacing: noise levels visited: leading, uniform, quad, linspace, linspace_open,
                trailing, karras or log_snr.
            batch_size: images at a time; rounded up to a multiple of the number of devices.
            noise: (B, h, w, C) float32 to start from, in place of the seeds' own.
            negative: batch fields that guidance leads away from, in place of the null condition.
            also: further conditions, each with its weight, which is below 0 for what is to be
                avoided; fields that one leaves away are those of `condition`. Each takes one more
                network call, as the null condition does.
            weak: a weaker model of the same latents, conditioners and process, which guidance leads
                away from in place of the null condition: smaller, or trained for less long.
            classifier_scale: by how much the gradient of the model's classifier is followed towards
                the class 'label' of the condition, which no conditioner need read; 0 = off.
            two_calls: guide by network calls in turn, in the memory of one.
            init_image: (B, H, W, 3) uint8 to start from, such as strokes of colour (Meng et al.
                2022); `strength` says how much of it may change.
            strength: share of the steps that are made, above 0; 1 without `init_image`.
            image: (B, H, W, 3) uint8 of which everything outside `hole` is kept, pixel by pixel.
                A model trained for inpainting takes both as its condition.
            hole: (B, H, W) bool, True where the image is to be made.
            resample: how often each step is made with `image` and `hole`, from latents that are
                noised again (Lugmayr et al. 2022, "RePaint"), and by how many steps; for ddpm,
                ddim and euler. It takes so many times the network calls.
            grey: (B, H, W) uint8, the luma that the result shall have.
            noise_level: to which the field 'low_res' is noised, by each seed, where the model was
                trained with such noise; 0 by default.
            size: (height, width) of the images in pixels; the training resolution by default.
                Fields that are maps or images have the size that goes with it.
            tile: side in pixels of the overlapping tiles in which the networks see an image, one
                at a time; 0 is all at once. By default that is so up to twice the training size,
                and of a transformer up to it, beyond which tiles have the training size.
            measured: called, before anything is made, with the bytes that this takes at most; may
                raise. `tile` in it is what runs on the device, with its inputs.
            decode: False returns the latents.

        Returns:
            uint8 (B, H, W, 3), or float32 latents (B, h, w, C).

        Raises:
            UserError: a setting outside its range, or a condition that does not fit the model.
        """
        s = self.config.sample
        seeds, size = check_seeds(seeds), self.check_size(size)
        count, sampler = len(seeds), s.sampler if sampler is None else sampler
        tile = arguments.choose_tile(self.config, size, tile)
        if tile is not None and jax.process_count() > 1:
            raise UserError("images in tiles are made on one host: start a single process")
        further, weights = conditions.split_weights(also)
        guidance = arguments.make_guidance(
            self.config,
            arguments.choose_scale(self.config, guidance_scale, condition, negative, weak),
            guidance_rescale,
            guidance_interval,
            negative is not None,
            weak=weak is not None,
            weights=weights,
            classifier_scale=classifier_scale,
        )
        if strength != 1 and init_image is None:
            raise UserError(f"strength is {strength:g}, but there is no init_image to start from")
        if tuple(resample) != (1, 1) and image is None:
            raise UserError("resample makes parts fit those of an image: give image and hole too")
        table = arguments.choose_table(
            self.config, self._schedule, sampler, steps, eta, spacing, strength, resample
        )
        pictures = arguments.check_pictures(count, size, init_image, image, hole, grey)
        pixels = decode or any(x is not None for x in pictures.values())
        self._need("denoiser", "conditioner", *(["first_stage"] if pixels else []))
        condition = conditions.noise_low_res(self.config, condition or {}, noise_level, seeds, size)
        if image is not None and "inpainting" in self.config.conditioners:
            condition |= conditions.inpainting_fields(pictures["image"], pictures["hole"])
        label = None
        if guidance.classifier_scale is not None:
            known = "classifier" in self.variables
            label, condition = conditions.label_to_find(
                self.config, condition, count, size, known, tile
            )
        fields = self._fields(condition, count, size)
        shape = arguments.latent_shape(self.config, size)
        inputs = {
            "seeds": seeds,
            "fields": fields,
            "negative": None if negative is None else self._fields(negative, count, size),
            "also": conditions.further_conditions(
                self.config, fields, further, count, size, self.tokenizer
            ),
            "weak": None if weak is None else weak_fields(self, weak, condition, count, size, tile),
            "label": label,
            "noise": arguments.check_noise(noise, (count, *shape)),
            **pictures,
        }
        guided = bool(further) or (guidance.scale != 1 and weak is None)  # from the null condition
        two_calls = s.two_calls if two_calls is None else two_calls
        variables = self.variables
        if weak is not None:
            parts = {name: weak.variables[name] for name in ("denoiser", "conditioner")}
            variables = variables | {"weak": parts}

        def tell(program: jax.stages.Compiled, part: dict[str, Any]) -> None:
            need = sampling_memory(
                self.config,
                variables,
                program,
                part,
                count=count,
                size=size,
                tile=tile,
                seen=1 if two_calls else 1 + guided + len(further),
                weak=None if weak is None else weak.config,
            )
            if tile is not None and "first_stage" in self.variables:
                decoding = self._tiled.memory(self.variables, *size, tile)
                need = need._replace(tile=max(need.tile, decoding.tile))
            measured(need)

        made = in_batches(
            self._jit["generate"],
            variables,
            inputs,
            (jax.tree.map(jnp.float32, guidance), jax.tree.map(jnp.asarray, table)),
            s.batch_size if batch_size is None else batch_size,
            self.mesh,
            tell if measured else None,
            sampler=sampler,
            size=shape[:2],
            guided=guided,
            decode=decode and tile is None,  # tiles of pixels are joined on the host
            two_calls=two_calls,
            tile=None if tile is None else tile // config_lib.downsampling(self.config),
            weak=None if weak is None else weak._networks,
        )
        if decode and tile is not None:
            made = self._decode_in_tiles(made, size, tile)
        if image is not None and decode:
            made = np.where(pictures["hole"][..., None], made, pictures["image"])
        return made

    def check_size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        """Returns (height, width) in pixels, by default the training size; see `arguments`."""
        return arguments.check_size(self.config, size)

    def _need(self, *parts: str) -> None:
        """Raises UserError unless there are weights of these parts."""
        for part in parts:
            if part not in self.variables:
                raise UserError(f"this model has no weights of its {part}: {MISSING[part]}")

    def initial_noise(
        self, seeds: Sequence[int], size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """The noise (B, h, w, C) that the images of these seeds start from."""
        keys = random.seed_keys(check_seeds(seeds))
        shape = arguments.latent_shape(self.config, self.check_size(size))
        return np.asarray(samplers.initial_noise(keys, shape))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, C) of one image's latents, at the training resolution."""
        return arguments.latent_shape(self.config, (self.config.data.resolution,) * 2)

    def _decode_in_tiles(self, latents: np.ndarray, size: tuple[int, int], tile: int) -> np.ndarray:
        """Decodes latents (B, h, w, C), image by image, to (B, H, W, 3) uint8."""
        made = np.empty((len(latents), *size, 3), np.uint8)
        for i in range(len(latents)):
            decoded = self._tiled.decode(self.variables, latents[i : i + 1], tile)
            made[i] = images.to_uint8(decoded[0])
        return made

    # -- conditions -----------------------------------------------------------------------------

    def condition(
        self, fields: Mapping[str, Any], size: tuple[int, int] | None = None
    ) -> Condition:
        """Encodes batch fields, e.g. {'label': [3, 5]}, into what the denoiser takes.

        `size` is (height, width) of the images in pixels, by default that of training.
        """
        self._need("conditioner")
        count = len(next(iter(fields.values()))) if fields else 0
        checked = self._fields(fields, count, self.check_size(size))
        return self._jit["condition"](self.variables, checked)

    def null_condition(self, batch_size: int) -> Condition:
        """Returns the empty condition of classifier-free guidance.

        Raises:
            UserError: the model was trained without one.
        """
        self._need("conditioner")
        return self._networks.null(self.variables, batch_size)

    def label(self, text: str | int) -> int:
        """Returns the class number that a number or a class name stands for.

        Raises:
            UserError: no such class, or a model without classes.
        """
        if "label" not in self.config.conditioners and "classifier" not in self.variables:
            raise UserError("this model knows no classes: leave --label away")
        return conditions.class_number(self.config, list(self.label_names or ()), text)

    def _fields(
        self, given: Mapping[str, Any] | None, count: int, size: tuple[int, int]
    ) -> conditions.Fields | None:
        return conditions.check_condition(self.config, given, count, size, self.tokenizer)

    # -- the parts on their own -----------------------------------------------------------------

    def encode(
        self, pixels: Any, tile: int | None = None, *, progress: Progress | None = None
    ) -> Array | np.ndarray:
        """Encodes images to scaled latents (B, h, w, C), at the mode of the posterior.

        Args:
            pixels: (B, H, W, 3) uint8, or float32 in [-1, 1]; sides that the first stage divides.
            tile: None encodes all images at once. The side of a tile in pixels, e.g. 512, encodes
                tile after tile, in the memory of one, and blends them where they overlap (by a
                quarter of a tile); the result is then a NumPy array.
            progress: called with the numbers of done and of all tiles, after each.

        Raises:
            UserError: no first stage, or images or a tile that it cannot take.
        """
        self._need("first_stage")
        pixels = check_pixels(pixels, self._tiled.factor)
        if tile is None:
            return self._jit["encode"](self.variables, pixels)
        return self._tiled.encode(self.variables, pixels, tile, progress)

    def decode(
        self, latents: Any, tile: int | None = None, *, progress: Progress | None = None
    ) -> Array | np.ndarray:
        """Decodes scaled latents (B, h, w, C) to images (B, H, W, 3) float32 in [-1, 1].

        `tile`, in pixels of the images, and `progress` are those of `encode`; so are the errors.
        """
        self._need("first_stage")
        shape, channels = np.shape(latents), self._tiled.channels
        if len(shape) != 4 or shape[-1] != channels or 0 in shape:
            raise UserError(f"latents have the shape {shape}, but must be (B, h, w, {channels})")
        if tile is None:
            latents = jnp.asarray(latents, jnp.float32)
            return jnp.clip(self._jit["decode"](self.variables, latents), -1, 1)
        latents = np.asarray(latents, np.float32)
        decoded = self._tiled.decode(self.variables, latents, tile, progress)
        return np.clip(decoded, -1, 1, out=decoded)

    def memory(self, height: int, width: int, tile: int | None = None) -> Memory:
        """Bytes that encoding and decoding one uint8 image takes at most; runs nothing.

        `tile` as in `encode`; None counts a tile as large as the image. Raises UserError likewise.
        """
        self._need("first_stage")
        check_sides(height, width, self._tiled.factor)
        return self._tiled.memory(self.variables, height, width, tile)

    def denoise(self, z_t: Any, t: Any, cond: Condition | None = None) -> Array:
        """Returns the raw network output (B, h, w, C) at z_t (B, h, w, C) and t (B,) int32.

        Without `cond`, a conditional model gets its null condition.
        """
        self._need("denoiser")
        if cond is None:
            cond = self.null_condition(len(z_t)) if self.config.conditioners else Condition()
        z_t, t = jnp.asarray(z_t, jnp.float32), jnp.asarray(t, jnp.int32)
        return self._jit["denoise"](self.variables, z_t, t, cond)
