"""What the figures of a run are called on a page, and which of them belong in one picture."""

from __future__ import annotations

from typing import NamedTuple


class Figure(NamedTuple):
    """How a figure is shown: its name, its unit, and whether more or less of it is better."""

    name: str
    unit: str = ""
    better: str = ""  # higher | lower


FIGURES = {
    "fid": Figure("FID", better="lower"),
    "fid_infinity": Figure("FID at infinite N", better="lower"),
    "sfid": Figure("sFID", better="lower"),
    "rfid": Figure("rFID", better="lower"),
    "fd_dino": Figure("FD (DINOv2)", better="lower"),
    "kid": Figure("KID", better="lower"),
    "is": Figure("Inception score", better="higher"),
    "precision": Figure("Precision", better="higher"),
    "recall": Figure("Recall", better="higher"),
    "density": Figure("Density", better="higher"),
    "coverage": Figure("Coverage", better="higher"),
    "psnr": Figure("PSNR", "dB", "higher"),
    "ssim": Figure("SSIM", better="higher"),
    "lpips": Figure("LPIPS", better="lower"),
    "mae": Figure("Mean absolute error", "in [-1, 1]", "lower"),
    "kl_per_element": Figure("KL per element", "nats"),
    "code_usage": Figure("Codes in use", "share"),
    "code_perplexity": Figure("Perplexity of the codes", "codes"),
    "bits_per_dim": Figure("Bits per dimension", better="lower"),
    "clip_score": Figure("CLIP score", better="higher"),
    "class_accuracy": Figure("Class accuracy", "share", "higher"),
    "low_res_psnr": Figure("PSNR of the reduced samples", "dB", "higher"),
    "luma_error": Figure("Error of the luma", "levels", "lower"),
    "stroke_distance": Figure("Distance to the strokes", "levels"),
    "change_outside_hole": Figure("Change outside the hole", "levels", "lower"),
    "loss": Figure("Loss"),
    "loss_simple": Figure("Unweighted loss"),
    "grad_norm": Figure("Norm of the gradient"),
    "learning_rate": Figure("Learning rate"),
    "images_per_second": Figure("Speed", "images/s"),
    "data_wait_share": Figure("Waiting for data", "share of the time"),
    "reconstruction_mae": Figure("Absolute error", "in [-1, 1]", "lower"),
    "reconstruction": Figure("Reconstruction term"),
    "skipped": Figure("Skipped steps"),
    "alarms": Figure("Alarms"),
    "bad_images": Figure("Bad images"),
    "kl": Figure("KL divergence", "nats per image"),
}
# Figures that are drawn in one picture, with its name.
TOGETHER = (
    (
        "Loss by amount of noise",
        {
            "loss_q0": "least",
            "loss_q1": "little",
            "loss_q2": "much",
            "loss_q3": "most",
        },
    ),
)
FIRST = ("fid", "loss", "loss_simple", "reconstruction_mae")  # of the curves; then held-out ones
LAST = ("grad_norm", "learning_rate", "images_per_second", "data_wait_share")
LINEAR = ("learning_rate", "images_per_second", "data_wait_share")  # axes, however they vary
SECTIONS = {
    "samples": "Samples",
    "foreign_samples": "Samples made elsewhere",
    "memorisation": "Memorisation",
    "condition": "Obedience to conditions",
    "likelihood": "Likelihood",
}


def figure(key: str) -> Figure:
    """How a figure is shown; one that is not known by its key, in which '_' becomes a space."""
    if key in FIGURES:
        return FIGURES[key]
    if key.startswith("eval_") and key[5:] in FIGURES:
        known = FIGURES[key[5:]]
        return known._replace(name=f"{known.name}, evaluated")
    words = key.replace("_", " ")
    return Figure(words[:1].upper() + words[1:])
