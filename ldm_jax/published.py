"""The first stages of the paper by name: network, discriminator and training of each.

Rombach et al. 2022, Table 8 and appendix F; the authors' released configurations.
"""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

FIRST_STAGES: dict[str, dict[str, dict[str, Any]]] = {
    "kl_f2": dict(
        network=dict(kind="kl", mult=(1, 2), channels=2, z_channels=2),
        discriminator=dict(start=50_001, weight=0.5),
        train=dict(batch_size=10, lr=4.5e-5, steps=176_991),
    ),
    "kl_f4": dict(
        network=dict(kind="kl", mult=(1, 2, 4), channels=3, z_channels=3),
        discriminator=dict(start=50_001, weight=0.5),
        train=dict(batch_size=10, lr=4.5e-5, steps=176_991),
    ),
    "kl_f8": dict(
        network=dict(kind="kl", mult=(1, 2, 4, 4), channels=4, z_channels=4),
        discriminator=dict(start=50_001, weight=0.5),
        train=dict(batch_size=4, lr=1.8e-5, steps=246_803),
    ),
    "kl_f16": dict(
        network=dict(
            kind="kl", mult=(1, 1, 2, 2, 4), attn_downsample=(16,), channels=16, z_channels=16
        ),
        discriminator=dict(start=50_001, weight=0.5),
        train=dict(batch_size=6, lr=2.7e-5, steps=442_998),
    ),
    "kl_f32": dict(
        network=dict(
            kind="kl", mult=(1, 1, 2, 2, 4, 4), attn_downsample=(16, 32), channels=64, z_channels=64
        ),
        discriminator=dict(start=50_001, weight=0.5),
        train=dict(batch_size=6, lr=2.7e-5, steps=406_763),
    ),
    "vq_f2": dict(
        network=dict(kind="vq", mult=(1, 2), channels=2, z_channels=2, codes=2048),
        discriminator=dict(start=0, weight=0.75),
        train=dict(batch_size=8, lr=3.6e-5, steps=533_066),
    ),
    "vq_f4": dict(
        network=dict(kind="vq", mult=(1, 2, 4), channels=3, z_channels=3, codes=8192),
        discriminator=dict(start=0, weight=0.75),
        train=dict(batch_size=8, lr=3.6e-5, steps=533_066),
    ),
    "vq_f4_noattn": dict(
        network=dict(
            kind="vq", mult=(1, 2, 4), mid_attn=False, channels=3, z_channels=3, codes=8192
        ),
        discriminator=dict(start=11, weight=0.75),
        train=dict(batch_size=8, lr=3.6e-5, steps=658_131),
    ),
    "vq_f8": dict(
        network=dict(
            kind="vq",
            mult=(1, 2, 2, 4),
            attn_downsample=(8,),
            channels=4,
            z_channels=4,
            codes=16384,
        ),
        discriminator=dict(start=1, weight=0.6, layers=2),
        train=dict(batch_size=10, lr=4.5e-5, steps=971_043),
    ),
    "vq_f8_n256": dict(
        network=dict(
            kind="vq", mult=(1, 2, 2, 4), attn_downsample=(8,), channels=4, z_channels=4, codes=256
        ),
        discriminator=dict(start=250_001, weight=0.75),
        train=dict(batch_size=10, lr=4.5e-5, steps=1_608_649),
    ),
    "vq_f16": dict(
        network=dict(
            kind="vq",
            mult=(1, 1, 2, 2, 4),
            attn_downsample=(16,),
            channels=8,
            z_channels=8,
            codes=16384,
        ),
        discriminator=dict(start=250_001, weight=0.75, layers=2),
        train=dict(batch_size=14, lr=6.3e-5, steps=1_101_166),
    ),
}


def use_first_stage(config: ConfigDict, name: str) -> None:
    """Sets `config.first_stage` to the published one of this name, a key of `FIRST_STAGES`."""
    blocks, c = FIRST_STAGES[name], config.first_stage
    c.update(blocks["network"])
    c.discriminator.update(blocks["discriminator"])
    c.train.update(blocks["train"])
