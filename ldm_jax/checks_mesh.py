"""What the mesh of devices and the microbatches of a config must obey."""

from __future__ import annotations

from ml_collections import ConfigDict

from ldm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def check_mesh(c: ConfigDict) -> None:
    """Checks what can be known of `mesh` and `accumulate` without looking at devices.

    Raises:
        UserError: sizes that cannot be, or that do not divide what they split.
    """
    for name in (*AXES, "dcn_data"):
        if c.mesh[name] < 1 and (name == "dcn_data" or c.mesh[name] != -1):
            rest = "" if name == "dcn_data" else ", or -1 for what is left"
            raise UserError(f"config.mesh.{name} is {c.mesh[name]}, but must be at least 1{rest}")
    left = [name for name in AXES if c.mesh[name] == -1]
    if len(left) > 1:
        raise UserError(
            f"config.mesh.{left[0]} and mesh.{left[1]} are both -1: only one can be what is left"
        )
    if c.mesh.data != -1 and c.mesh.data % c.mesh.dcn_data:
        raise UserError(
            f"config.mesh.dcn_data is {c.mesh.dcn_data}, but must divide mesh.data, {c.mesh.data}"
        )
    if c.first_stage.train.accumulate != 1:
        raise UserError(
            "config.first_stage.train.accumulate must be 1: running statistics of the "
            "discriminator and the codebook are of whole batches; lower its batch_size instead"
        )
    for name, block in (("train", c.train), ("classifier.train", c.classifier.train)):
        if block.accumulate > 1 and block.batch_size % block.accumulate:
            raise UserError(
                f"config.{name}.accumulate is {block.accumulate}, but must divide "
                f"{name}.batch_size, {block.batch_size}"
            )
    if c.mesh.tensor > 1 and c.train.steps > 0:
        for key, heads in attention_heads(c):
            if heads % c.mesh.tensor:
                raise UserError(
                    f"config.mesh.tensor is {c.mesh.tensor}, which does not divide the {heads} "
                    f"attention heads of {key}"
                )


def attention_heads(c: ConfigDict) -> list[tuple[str, int]]:
    """What attends in the diffusion model, and by how many heads, as (name, heads)."""
    d, found = c.denoiser, []
    if d.kind == "dit":
        found.append(("the denoiser", d.num_heads or d.width // d.head_dim))
    else:
        last = len(d.mult) - 1
        for level, mult in enumerate(d.mult):
            if level == last or 2**level in d.attn_downsample:
                heads = d.num_heads or mult * d.width // d.head_dim
                found.append((f"the denoiser's level {level}", heads))
    if "text" in c.conditioners:
        found.append(("config.text", c.text.heads))
    if "layout" in c.conditioners:
        found.append(("the layout encoder", 8))
    return found
