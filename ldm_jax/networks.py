"""The networks of a model put to use: pure functions of its variables, from inputs to pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ldm_jax import builders, images, random
from ldm_jax import config as config_lib
from ldm_jax import fields as fields_lib
from ldm_jax.diffusion import samplers
from ldm_jax.diffusion.constraint import constrain, keep_luma
from ldm_jax.diffusion.guidance import Apply, Guidance, Guides, make_denoise
from ldm_jax.diffusion.schedule import Level
from ldm_jax.diffusion.tiles import scan_tiles, tiled_in_turn
from ldm_jax.types import Array, Condition

Variables = dict[str, Any]
METHODS = ("encode", "decode", "condition", "denoise", "generate")  # of `Networks`


class Networks:
    """First stage, denoiser and conditioner of a config.

    Every method takes `variables`, {'first_stage': variables, 'denoiser': params, 'conditioner':
    params, 'classifier': params}, and may be jitted.
    """

    def __init__(self, config: ConfigDict) -> None:
        self.config = config
        self.first_stage = builders.build_first_stage(config)
        self.denoiser = builders.build_denoiser(config)
        self.conditioner = builders.build_conditioner(config)
        self.classifier = builders.build_classifier(config)
        factor = config_lib.downsampling(config)
        self._encoding, self._decoding = (factor, 1), (1, factor)  # scales of `scan_tiles`

    def encode(self, variables: Variables, pixels: Array) -> Array:
        """Images (B, H, W, 3), uint8 or in [-1, 1] -> scaled latents (B, h, w, C), at the mode."""
        pixels = images.to_float(pixels) if pixels.dtype == jnp.uint8 else pixels
        moments = self.first_stage.apply(variables["first_stage"], pixels, method="moments")
        return self.first_stage.apply(variables["first_stage"], moments, method="mode")

    def decode(self, variables: Variables, latents: Array) -> Array:
        """Scaled latents (B, h, w, C) -> images (B, H, W, 3), not clipped."""
        return self.first_stage.apply(variables["first_stage"], latents, method="decode")

    def condition(
        self, variables: Variables, fields: dict[str, Array], tile: int | None = None
    ) -> Condition:
        """Batch fields -> what the denoiser takes; images in them are encoded in tiles or whole."""
        first_stage = variables.get("first_stage")
        encode = functools.partial(self.first_stage.apply, first_stage, method="encode")
        batch = fields_lib.add_latents(fields, _in_tiles(encode, tile, self._encoding))
        return self.conditioner.apply({"params": variables["conditioner"]}, batch)

    def null(self, variables: Variables, batch_size: int) -> Condition:
        """The empty condition of guidance."""
        params = {"params": variables["conditioner"]}
        return self.conditioner.apply(params, batch_size, method="null")

    def denoise(self, variables: Variables, z_t: Array, t: Array, cond: Condition) -> Array:
        """The raw output (B, h, w, C) at z_t (B, h, w, C) and t (B,)."""
        return self.denoiser.apply({"params": variables["denoiser"]}, z_t, t, cond)

    def log_prob_grad(self, variables: Variables, z_t: Array, t: Array, label: Array) -> Array:
        """The gradient (B, h, w, C) float32 of log p(label | z_t) by z_t (B, h, w, C).

        t () or (B,) is the time that the classifier is told, label (B,) int in [0, K); an example's
        gradient depends on that example alone.
        """
        times = jnp.broadcast_to(t, z_t.shape[:1])

        def log_prob(z_t: Array) -> Array:
            logits = self.classifier.apply({"params": variables["classifier"]}, z_t, times)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
            return chosen.sum()  # of examples that do not see each other

        return jax.grad(log_prob)(z_t.astype(jnp.float32))

    def generate(
        self,
        variables: Variables,
        inputs: dict[str, Any],
        guidance: Guidance,
        table: samplers.Table,
        *,
        sampler: str,
        size: tuple[int, int],
        guided: bool,
        decode: bool,
        two_calls: bool = False,
        tile: int | None = None,
        weak: Networks | None = None,
    ) -> Array:
        """The whole way from seeds to pixels (B, H, W, 3) uint8 or latents (B, h, w, C).

        Args:
            variables: see the class; 'weak' has a 'denoiser' and a 'conditioner' of its own.
            inputs: arrays with a row per image, or None: 'seeds' (B,), 'fields' of the condition,
                of the 'negative' one and of the one that the 'weak' model is told, 'also', a tuple
                of such for further conditions, 'label' (B,) that a classifier is to find, 'noise'
                (B, h, w, C) in place of the seeds', 'start' (B, H, W, 3) pixels that the first row
                of the table is reached from, 'image' (B, H, W, 3) and 'hole' (B, H, W) bool, what
                is to be kept and where not, 'grey' (B, H, W) in [-1, 1], the luma of the result.
            guidance: its scale, and what else there is of it.
            table: of the sampler.
            sampler: its name.
            size: (h, w) of the latents.
            guided: whether anything leads away from the null condition.
            decode: False returns the latents.
            two_calls: see `make_denoise`.
            tile: side of the tiles, in latents, that the denoiser and the first stage see at a
                time; None shows them everything at once.
            weak: the networks of the weaker model that guidance leads away from.
        """
        keys, noise = random.seed_keys(inputs["seeds"]), inputs["noise"]
        shape = (*size, config_lib.latent_channels(self.config))
        if noise is None:
            noise = samplers.initial_noise(keys, shape)
        cond = self._told(variables, inputs["fields"], len(noise), tile)
        null = None
        if guided:
            null = self._told(variables, inputs["negative"], len(noise), tile)
        denoise = make_denoise(
            self._apply(variables, tile),
            self.config.diffusion.predict,
            cond,
            null,
            guidance,
            sigma_data=self.config.diffusion.sigma_data,
            two_calls=two_calls,
            guides=self._guides(variables, inputs, tile, weak),
        )
        encode = _in_tiles(functools.partial(self.encode, variables), tile, self._encoding)
        decoded = _in_tiles(functools.partial(self.decode, variables), tile, self._decoding)
        if inputs["grey"] is not None:
            denoise = constrain(denoise, keep_luma(inputs["grey"], encode, decoded))
        known = start = None
        if inputs["start"] is not None:
            start = encode(inputs["start"])
        if inputs["image"] is not None:
            known = known_latents(encode, inputs["image"], inputs["hole"], size)
        chosen = samplers.SAMPLERS[sampler]
        latents = samplers.sample(denoise, noise, keys, table, chosen, known=known, x0=start)
        return images.to_uint8(decoded(latents)) if decode else latents

    def _apply(self, variables: Variables, tile: int | None) -> Apply:
        """The denoiser, at once or tile by tile."""
        apply = functools.partial(self.denoise, variables)
        return apply if tile is None else tiled_in_turn(apply, tile)

    def _told(
        self, variables: Variables, fields: dict[str, Array] | None, count: int, tile: int | None
    ) -> Condition:
        """What the denoiser is told of `count` images: the null condition where there are none."""
        if fields is not None:
            return self.condition(variables, fields, tile)
        return self.null(variables, count) if config_lib.has_null(self.config) else Condition()

    def _guides(
        self,
        variables: Variables,
        inputs: dict[str, Any],
        tile: int | None,
        weak: Networks | None,
    ) -> Guides:
        """What steers besides the condition; the arguments are those of `generate`."""
        count, weaker, log_prob_grad = len(inputs["seeds"]), None, None
        also = tuple(self.condition(variables, fields, tile) for fields in inputs["also"])
        if weak is not None:
            theirs = {"first_stage": variables.get("first_stage")} | variables["weak"]
            told = weak._told(theirs, inputs["weak"], count, tile)
            apply = weak._apply(theirs, tile)

            def weaker(x_t: Array, t: Array) -> Array:
                return apply(x_t, t, told)

        if inputs["label"] is not None:

            def log_prob_grad(x_t: Array, level: Level) -> Array:
                return self.log_prob_grad(variables, x_t, level.t, inputs["label"])

        return Guides(weaker, also, log_prob_grad)


def known_latents(
    encode: Callable[[Array], Array], image: Array, hole: Array, size: tuple[int, int]
) -> samplers.Known:
    """The latents of an image (B, H, W, 3) uint8, kept where no pixel of theirs is in the hole
    (B, H, W) bool; `size` is (h, w) of the latents."""
    kept = ~hole[..., None]
    pixels = images.to_float(image)
    # What is in the hole must not reach the latents around it: it gets the mean colour there.
    mean = (pixels * kept).sum((1, 2), keepdims=True) / kept.sum((1, 2), keepdims=True)
    latents = encode(jnp.where(kept, pixels, mean))
    batch, height, width, _ = kept.shape
    windows = kept.reshape(batch, size[0], height // size[0], size[1], width // size[1])
    return samplers.Known(latents, windows.all((2, 4))[..., None].astype(latents.dtype))


def _in_tiles(
    apply: Callable[[Array], Array], tile: int | None, scale: tuple[int, int]
) -> Callable[[Array], Array]:
    if tile is None:
        return apply
    return lambda x: scan_tiles(apply, x, tile, scale)


def jitted(networks: Networks) -> dict[str, Any]:
    """The methods, compiled; what they have compiled belongs to this call's result."""
    # Bound methods would make the caches of all instances one.
    own = {name: functools.partial(getattr(networks, name)) for name in METHODS}
    static = {"generate": ("sampler", "size", "guided", "decode", "two_calls", "tile", "weak")}
    return {name: jax.jit(f, static_argnames=static.get(name)) for name, f in own.items()}
