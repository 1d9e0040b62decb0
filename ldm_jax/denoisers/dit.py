"""A diffusion transformer (Peebles & Xie 2023) over patches of the latents, channels last."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from ldm_jax.errors import UserError
from ldm_jax.nn import positions as positions_lib
from ldm_jax.nn.attention import attend, head_count
from ldm_jax.nn.embed import TimeEmbedding
from ldm_jax.nn.layers import Dense, Dropout, RMSNorm, spread, standardize
from ldm_jax.nn.remat import rematerialised
from ldm_jax.nn.resnet import depth_to_space, space_to_depth
from ldm_jax.types import Array, Condition

EPSILON = 1e-6
FREQUENCIES = 256  # sinusoids of the time
POSITIONS = ("sincos", "rotary")
CONTEXTS = ("none", "cross", "joint")
MLPS = ("gelu", "swiglu")

# Kernels start as in the published models, not as in the UNet.
Linear = functools.partial(
    Dense, kernel_init=nn.initializers.xavier_uniform(), bias_init=nn.initializers.zeros
)
ZeroLinear = functools.partial(Dense, zero_init=True)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Adaptive layer normalisation: x (B, T, C), shift and scale (B, 1, C) float32 -> (B, T, C)."""
    return (standardize(x, EPSILON) * (1.0 + scale) + shift).astype(x.dtype)


class Modulation(nn.Module):
    """Maps an embedding (B, E) to `count` float32 arrays (B, 1, width), all zero at the start."""

    count: int
    width: int

    @nn.compact
    def __call__(self, embedding: Array) -> list[Array]:
        h = ZeroLinear(self.count * self.width, name="dense")(nn.silu(embedding))
        return jnp.split(h[:, None, :], self.count, axis=-1)


class MLP(nn.Module):
    """Two layers, token by token: (B, T, C) -> (B, T, C).

    'gelu' has 4 C hidden units (tanh approximation, as the published models); 'swiglu' (Shazeer
    2020) is gated and has 8 C / 3, rounded up to a multiple of 32, so that both have the same size.
    """

    kind: str
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        width = x.shape[-1]
        if self.kind == "gelu":
            h = nn.gelu(Linear(4 * width, dtype=self.dtype, name="in")(x), approximate=True)
        else:
            hidden = -(-8 * width // 96) * 32
            h = Linear(2 * hidden, dtype=self.dtype, name="in")(x)
            h, gate = jnp.split(h, 2, axis=-1)
            h = h * nn.silu(gate)
        return Linear(width, dtype=self.dtype, name="out")(h)


class Heads(nn.Module):
    """Projects tokens (B, T, C) to what `names` says, each (B, T, heads, width / heads).

    `names` is 'qkv', 'q' or 'kv'. With `qk_norm`, queries and keys are normalised with a learned
    scale, which keeps the softmax from saturating (Dehghani et al. 2023; Esser et al. 2024).
    """

    names: str
    heads: int
    width: int
    qk_norm: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        h = Linear(len(self.names) * self.width, dtype=self.dtype, name="dense")(x)
        h = h.reshape(*x.shape[:2], len(self.names), self.heads, -1)
        parts = [h[:, :, i] for i in range(len(self.names))]
        if not self.qk_norm:
            return parts
        return [
            part if name == "v" else RMSNorm(EPSILON, name=f"norm_{name}")(part)
            for name, part in zip(self.names, parts, strict=True)
        ]


class Block(nn.Module):
    """One transformer block with adaLN-zero: it starts as the identity.

    Self-attention and an MLP, each normalised and gated by the embedding. With context 'cross',
    attention to the context lies between them (Chen et al. 2024, PixArt); with 'joint', the
    context's tokens take part in the self-attention and have projections, modulation and an MLP of
    their own (Esser et al. 2024, MMDiT).
    """

    heads: int
    context: str
    mlp: str
    qk_norm: bool
    dropout: float
    train: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        carry: tuple[Array, Array | None],
        embedding: Array,
        angles: Array | None,
        mask: Array | None,
    ) -> tuple[tuple[Array, Array | None], None]:
        """Carries tokens (B, T, C) and context (B, L, C) through; of the form of `nn.scan`.

        embedding (B, C), angles (T, C / heads / 2) of rotary positions, mask (B, L) bool.
        """
        x, context = carry
        heads = functools.partial(
            Heads, heads=self.heads, width=x.shape[-1], qk_norm=self.qk_norm, dtype=self.dtype
        )
        streams = {"image": x} | ({"context": context} if self.context == "joint" else {})
        modulation, qkv = {}, {}
        for name, tokens in streams.items():
            modulation[name] = Modulation(6, x.shape[-1], name=f"{name}_modulation")(embedding)
            shift, scale = modulation[name][:2]
            q, k, v = heads("qkv", name=f"{name}_qkv")(modulate(tokens, shift, scale))
            if name == "image" and angles is not None:
                q, k = (positions_lib.rotate(a, angles) for a in (q, k))
            qkv[name] = q, k, v

        # Every stream's queries see the keys of all streams; the mask is the context's.
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*qkv.values(), strict=True))
        joined = None
        if self.context == "joint" and mask is not None:
            joined = jnp.concatenate([jnp.ones(x.shape[:2], bool), mask], axis=1)
        attended = attend(q, k, v, joined)
        attended = attended.reshape(*attended.shape[:2], -1)

        ends = np.cumsum([tokens.shape[1] for tokens in streams.values()])[:-1]
        new = {"context": context}
        for part, (name, tokens) in zip(
            jnp.split(attended, ends, axis=1), streams.items(), strict=True
        ):
            gate, shift, scale, gate_mlp = modulation[name][2:]
            h = Linear(x.shape[-1], dtype=self.dtype, name=f"{name}_out")(part)
            tokens = self._add(tokens, h, gate, f"{name}_dropout_0")
            if self.context == "cross":
                tokens = tokens + self._cross(tokens, context, mask, heads)
            h = MLP(self.mlp, self.dtype, name=f"{name}_mlp")(modulate(tokens, shift, scale))
            new[name] = self._add(tokens, h, gate_mlp, f"{name}_dropout_1")
        return (new["image"], new["context"]), None

    def _add(self, tokens: Array, branch: Array, gate: Array, name: str) -> Array:
        branch = Dropout(self.dropout, name=name)(branch, self.train)
        return tokens + branch * spread(gate, branch)

    def _cross(self, tokens: Array, context: Array, mask: Array | None, heads) -> Array:
        """Attention to the context, zero at the start like the rest of the block."""
        h = standardize(tokens, EPSILON).astype(tokens.dtype)
        (q,) = heads("q", name="cross_q")(h)
        k, v = heads("kv", name="cross_kv")(context)
        h = attend(q, k, v, mask).reshape(tokens.shape)
        return ZeroLinear(tokens.shape[-1], dtype=self.dtype, name="cross_out")(h)


class DiT(nn.Module):
    """Predictor of noise (or x0, v, flow) that is a transformer over patches of the latents.

    The blocks are one `nn.scan`, compiled once whatever the depth: each of their parameters has a
    leading axis of `depth`.

    Attributes:
        width: channels of a token and of the embedding of time and vector.
        out_channels: channels of the output.
        depth: blocks.
        num_heads: heads of every attention; 0 derives them from `head_dim`.
        head_dim: width of one head.
        patch: latents per side of a token.
        positions: 'rotary' turns queries and keys by rows and columns, 'sincos' adds a fixed
            embedding to the tokens. Both are made for the size of the map at hand.
        context: how `cond.context` is read: 'none', 'cross' or 'joint', see `Block`.
        mlp: 'gelu' or 'swiglu', see `MLP`.
        qk_norm: normalises queries and keys, see `Heads`.
        dropout: rate on the output of attention and MLP, active when `train`; needs the 'dropout'
            stream.
        dtype: of the computation; parameters, modulation, normalisation, softmax and output are
            float32.
        remat: what the backward pass recomputes of each block to save memory: 'none', 'block' or
            'dots', see `rematerialised`.
    """

    width: int
    out_channels: int
    depth: int
    num_heads: int = 0
    head_dim: int = 0
    patch: int = 2
    positions: str = "rotary"
    context: str = "none"
    mlp: str = "gelu"
    qk_norm: bool = True
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, x_t: Array, t: Array, cond: Condition, *, train: bool = False) -> Array:
        """x_t (B, h, w, C), t (B,) int or float -> (B, h, w, out_channels) float32.

        `cond.concat` (B, h, w, K) is joined to `x_t`, `cond.context` (B, L, D) with
        `cond.context_mask` (B, L) is attended to, `cond.vector` (B, width) is added to the time
        embedding. Raises UserError if sizes or slots do not fit the fields.
        """
        heads = self._check(x_t, cond)
        if cond.concat is not None:
            x_t = jnp.concatenate([x_t, cond.concat.astype(x_t.dtype)], axis=-1)
        embedding = TimeEmbedding(FREQUENCIES, self.width, name="time_embed")(t)
        if cond.vector is not None:
            embedding = embedding + cond.vector.astype(jnp.float32)

        patches = space_to_depth(x_t, self.patch)  # (B, h', w', C')
        batch, height, width, channels = patches.shape
        h = patches.reshape(batch, height * width, channels)
        h = Linear(self.width, dtype=self.dtype, name="patch_in")(h)
        places, angles = positions_lib.grid(height, width), None
        if self.positions == "rotary":
            angles = jnp.asarray(positions_lib.rotary_angles(places, self.width // heads))
        else:
            fixed = positions_lib.sincos_embedding(places, self.width)
            h = h + jnp.asarray(fixed, self.dtype)[None]
        context = cond.context
        if context is not None:
            context = Linear(self.width, dtype=self.dtype, name="context_in")(context)

        # Without common subexpressions to find, a scan needs no barriers against joining them.
        block = rematerialised(Block, self.remat, prevent_cse=False)
        scanned = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=self.depth,
        )
        blocks = scanned(
            heads,
            self.context,
            self.mlp,
            self.qk_norm,
            self.dropout,
            train,
            self.dtype,
            name="blocks",
        )
        (h, _), _ = blocks((h, context), embedding, angles, cond.context_mask)

        shift, scale = Modulation(2, self.width, name="modulation_out")(embedding)
        h = modulate(h, shift, scale)
        h = ZeroLinear(self.patch**2 * self.out_channels, dtype=self.dtype, name="patch_out")(h)
        h = depth_to_space(h.reshape(batch, height, width, -1), self.patch)
        return h.astype(jnp.float32)

    def _check(self, x_t: Array, cond: Condition) -> int:
        """The number of heads; raises UserError where the input would be used wrongly."""
        for name, value, known in (
            ("positions", self.positions, POSITIONS),
            ("context", self.context, CONTEXTS),
            ("mlp", self.mlp, MLPS),
        ):
            if value not in known:
                raise UserError(f"a DiT has no {name} '{value}': choose from {', '.join(known)}")
        heads = head_count(self.width, self.num_heads, self.head_dim)
        rotary = self.positions == "rotary"
        if (self.width // heads if rotary else self.width) % 4:
            what = f"heads of {self.width // heads}" if rotary else f"{self.width}"
            raise UserError(
                f"positions '{self.positions}' need a multiple of 4 channels, got {what}: choose "
                "another width or number of heads"
            )
        if x_t.shape[1] % self.patch or x_t.shape[2] % self.patch:
            raise UserError(
                f"a DiT with patch {self.patch} needs heights and widths that are multiples of "
                f"it, got {x_t.shape[1]}x{x_t.shape[2]}"
            )
        if self.context != "none" and cond.context is None:
            raise UserError(
                f"the DiT has context='{self.context}', but the condition has no context"
            )
        if self.context == "none" and cond.context is not None:
            raise UserError(
                "the condition has a context: set context='cross' or 'joint' in the DiT"
            )
        if cond.vector is not None and cond.vector.shape[-1] != self.width:
            raise UserError(
                f"the condition's vector must be {self.width} wide (the DiT's width), "
                f"got {cond.vector.shape[-1]}"
            )
        return heads
