"""Attention in tiles with an online softmax, whose memory is linear in the number of tokens.

The rows of the softmax are gone through in tiles of keys, with a running maximum and a running sum
(Milakov & Gimelshein 2018; Rabe & Staats 2021); the backward pass makes each tile of weights again
from the maximum and the sum (Dao et al. 2022, algorithm 4).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ldm_jax.types import Array

# float32 values of one tile of logits of all heads and examples, and the sides of a tile: large
# enough for fast products, small enough for a CPU's caches.
TILE_VALUES, SMALLEST, LARGEST = 2**20, 128, 512
MASKED = float(jnp.finfo(jnp.float32).min)


class _Tiles(NamedTuple):
    """What the passes go through: tiles of queries (n, B, heads, t, D), of keys (m, B, heads, s, D)
    and of values, and what of them counts, if not all.

    `mask` ((n or 1), m, B or 1, 1, t or 1, s) says which keys may be attended to, `inside` (m, s)
    which are no padding.
    """

    q: Array
    k: Array
    v: Array
    mask: Array | None
    inside: Array | None


@jax.custom_vjp
def attend_tiled(q: Array, k: Array, v: Array, mask: Array | None) -> Array:
    """The same as `ldm_jax.nn.attend.attend`. Has no forward-mode derivative."""
    return _forward(q, k, v, mask)[0]


def _forward(q: Array, k: Array, v: Array, mask: Array | None) -> tuple[Array, tuple]:
    tiles = _split(q, k, v, mask)

    def row(_: None, xs: tuple[Array, Array | None]) -> tuple[None, tuple[Array, Array, Array]]:
        q_tile, masks = xs
        top = jnp.full(q_tile.shape[:-1], MASKED, jnp.float32)
        carry = top, jnp.zeros_like(top), jnp.zeros(q_tile.shape, jnp.float32)
        columns = tiles.k, tiles.v, masks, tiles.inside
        (top, total, out), _ = jax.lax.scan(functools.partial(_add_keys, q_tile), carry, columns)
        return None, ((out / total[..., None]).astype(v.dtype), top, total)

    _, (out, top, total) = _over_queries(row, None, tiles.mask, tiles.q)
    return _joined(out, q.shape), (q, k, v, mask, out, top, total)


def _add_keys(
    q_tile: Array, carry: tuple[Array, Array, Array], xs: tuple
) -> tuple[tuple[Array, Array, Array], None]:
    """Adds one tile of keys to the maximum, the sum and the output of a tile of queries."""
    top, total, out = carry
    k_tile, v_tile, mask, inside = xs
    logits = _logits(q_tile, k_tile, mask, inside)
    new_top = jnp.maximum(top, logits.max(-1))
    weights = jnp.exp(logits - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    added = jnp.einsum(
        "bnts,bnsd->bntd",
        weights.astype(v_tile.dtype),
        v_tile,
        preferred_element_type=jnp.float32,
    )
    return (new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + added), None


def _backward(residuals: tuple, grad: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, mask, out, top, total = residuals
    tiles = _split(q, k, v, mask)
    grad = _tiled(grad.transpose(0, 2, 1, 3), tiles.q.shape[0], tiles.q.shape[3])
    # The sum of weight * its gradient over the keys of a query.
    along = (grad.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    rows = tiles.q, grad, top, 1.0 / total, along

    def column(dq: Array, xs: tuple) -> tuple[Array, tuple[Array, Array]]:
        k_tile, v_tile, masks, inside = xs
        step = functools.partial(_add_queries, k_tile, v_tile, inside)
        zero = jnp.zeros(k_tile.shape, jnp.float32)
        (dk, dv), dq = _over_queries(step, (zero, zero), masks, (rows, dq))
        return dq, (dk, dv)

    masks = None if tiles.mask is None else jnp.moveaxis(tiles.mask, 1, 0)
    dq = jnp.zeros(tiles.q.shape, jnp.float32)
    dq, (dk, dv) = jax.lax.scan(column, dq, (tiles.k, tiles.v, masks, tiles.inside))
    dq = dq * q.shape[-1] ** -0.5
    dq, dk, dv = (_joined(d, x.shape).astype(x.dtype) for d, x in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, None


def _add_queries(
    k_tile: Array, v_tile: Array, inside: Array | None, carry: tuple[Array, Array], xs: tuple
) -> tuple[tuple[Array, Array], Array]:
    """Adds one tile of queries to the gradients of a tile of keys, and the other way around."""
    dk, dv = carry
    ((q_tile, grad, top, inverse, along), dq), mask = xs
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = _logits(q_tile, k_tile, mask, inside)
    weights = jnp.exp(logits - top[..., None]) * inverse[..., None]
    dv = dv + product("bnts,bntd->bnsd", weights.astype(grad.dtype), grad)
    dlogits = weights * (product("bntd,bnsd->bnts", grad, v_tile) - along[..., None])
    if mask is not None:
        dlogits = jnp.where(mask, dlogits, 0.0)
    dlogits = dlogits.astype(q_tile.dtype)
    dk = dk + product("bnts,bntd->bnsd", dlogits, q_tile)
    return (dk, dv), dq + product("bnts,bnsd->bntd", dlogits, k_tile)


attend_tiled.defvjp(_forward, _backward)


def _logits(q_tile: Array, k_tile: Array, mask: Array | None, inside: Array | None) -> Array:
    """Logits (B, heads, t, s) float32; a row with no key at all attends to each alike."""
    logits = jnp.einsum("bntd,bnsd->bnts", q_tile, k_tile, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    if inside is not None:
        logits = jnp.where(inside.reshape(1, 1, 1, -1), logits, -jnp.inf)
    return logits


def _over_queries(step, carry, masks: Array | None, xs):
    """`lax.scan` of step(carry, (x, mask)) over tiles of queries; masks (n or 1, ...)."""
    if masks is not None and masks.shape[0] == 1:
        return jax.lax.scan(lambda carry, x: step(carry, (x, masks[0])), carry, xs)
    return jax.lax.scan(step, carry, (xs, masks))


def _split(q: Array, k: Array, v: Array, mask: Array | None) -> _Tiles:
    """Cuts into tiles, with the heads in front (see `ldm_jax.nn.attend`) and scaled queries."""
    batch, t, heads, dim = q.shape
    s = k.shape[1]
    side = int((TILE_VALUES / (batch * heads)) ** 0.5)
    (n, t_tile), (m, s_tile) = (_cut(length, side) for length in (t, s))
    q, k, v = (tokens.transpose(0, 2, 1, 3) for tokens in (q * dim**-0.5, k, v))
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        rows, row_tile = (n, t_tile) if mask.shape[1] > 1 else (1, 1)
        padding = rows * row_tile - mask.shape[1], m * s_tile - s
        mask = jnp.pad(mask, ((0, 0), *((0, p) for p in padding)))
        mask = mask.reshape(-1, 1, rows, row_tile, m, s_tile).transpose(2, 4, 0, 1, 3, 5)
    inside = None if m * s_tile == s else jnp.arange(m * s_tile).reshape(m, s_tile) < s
    return _Tiles(_tiled(q, n, t_tile), _tiled(k, m, s_tile), _tiled(v, m, s_tile), mask, inside)


def tile_side(length: int, rows: int) -> int:
    """Side of the square tiles of self-attention of so many tokens, with `rows` = B * heads."""
    return _cut(length, int((TILE_VALUES / rows) ** 0.5))[1]


def _cut(length: int, side: int) -> tuple[int, int]:
    """(number, size) of tiles of about `side` tokens that cover `length` with little to spare."""
    number = -(-length // min(max(side, SMALLEST), LARGEST))
    return number, -(-length // (8 * number)) * 8


def _tiled(tokens: Array, number: int, size: int) -> Array:
    """(B, heads, T, D) -> (number, B, heads, size, D), padded with zeros."""
    batch, heads, length, dim = tokens.shape
    tokens = jnp.pad(tokens, ((0, 0), (0, 0), (0, number * size - length), (0, 0)))
    return tokens.reshape(batch, heads, number, size, dim).transpose(2, 0, 1, 3, 4)


def _joined(tiles: Array, shape: tuple[int, ...]) -> Array:
    """(number, B, heads, size, D) -> (B, T, heads, D) of `shape`, without the padding."""
    number, batch, heads, size, dim = tiles.shape
    tokens = tiles.transpose(1, 0, 3, 2, 4).reshape(batch, number * size, heads, dim)
    return tokens[:, : shape[1]]
