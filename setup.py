"""Packaging of megatron_spd. Tested versions are pinned in constraints.txt; tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megatron_spd/__init__.py").read_text(), re.M)[1]

setup(
    name="megatron_spd",
    version=VERSION,
    description="Sync-Point Drop for tensor-parallel language models: fewer all-reduces from the same checkpoint",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_spd", "megatron_spd.*"]),
    # The modelling files are shipped inside every export: they are copied as files, never imported from there.
    package_data={"megatron_spd.checkpoint.remote_code": ["*.py"], "megatron_spd.scale": ["*.json"]},
    zip_safe=False,
    install_requires=[
        "torch>=2.6",
        "megatron-core>=0.16.1",
        "deepspeed>=0.17",
        "transformers>=5.16.1",
        "safetensors",
        "numpy",
        "scipy",
        "einops",
        "psutil",
        "pyyaml",
        "tqdm",
        "jinja2",
        "matplotlib",
    ],
    extras_require={
        "eval": ["accelerate", "lm-eval>=0.4.13"],  # tasks of `megatron-spd evaluate`
        "cpu": ["numba"],  # compiled packing of low-bit all-reduces on machines without a GPU
        "gguf": ["accelerate", "gguf"],  # transformers reads GGUF files with both
        "wandb": ["wandb"],
        "dev": [
            "hypothesis",
            "mypy",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "rouge-score",
            "ruff",
            "triton",  # runs the kernels' tests without a GPU
        ],
    },
    entry_points={
        "console_scripts": ["megatron-spd = megatron_spd.cli:main"],
        # vLLM calls this in every process it starts, where both are installed.
        "vllm.general_plugins": ["megatron_spd = megatron_spd.serving.vllm:register"],
    },
)
