"""What a config must obey in how it watches over the training of its stages."""

from __future__ import annotations

from ml_collections import ConfigDict

from ldm_jax.errors import UserError

# Of fewer steps the spread is little known; medians of more take time.
WINDOWS = (10, 10_000)


def check_training(c: ConfigDict) -> None:
    """Checks how spikes of the loss are found, and how many samples are measured.

    Raises:
        UserError: a value that cannot work, by its key.
    """
    blocks = {"first_stage.train": c.first_stage.train, "train": c.train}
    for name, block in (blocks | {"classifier.train": c.classifier.train}).items():
        if block.spike_factor and not block.spike_factor > 1:
            raise UserError(
                f"config.{name}.spike_factor is {block.spike_factor}, but must be above 1, or 0 to "
                "look for no spikes"
            )
        if not WINDOWS[0] <= block.spike_window <= WINDOWS[1]:
            raise UserError(
                f"config.{name}.spike_window is {block.spike_window}, but must be from "
                f"{WINDOWS[0]} to {WINDOWS[1]}"
            )
    if c.train.fid_samples < 2:
        raise UserError(
            f"config.train.fid_samples is {c.train.fid_samples}, but must be at least 2, and "
            "better 1000"
        )
