from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llm_jax",
    version="0.1.0",
    description="A language model's whole life in one small JAX codebase",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["llm_jax*", "tools*"]),
    install_requires=[
        "jax>=0.10",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "ml-collections>=1.1.0",
        "tensorboard>=2.21",
        "tokenizers>=0.22",
        "rich>=14",
        "jinja2>=3.1.6",
        "numpy>=2.0",
    ],
    extras_require={
        "test": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "ruff>=0.17",
            "mypy>=2.0",
            "matplotlib>=3.10",
            "pyarrow>=20",
            "zstandard>=0.24",
            "sentencepiece>=0.2.1",
            "safetensors>=0.5",
            "jsonschema>=4.26",
        ],
        "rewards": ["jsonschema>=4.26"],
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda13]>=0.10"],
        "hf": ["datasets>=4.0", "pyarrow>=20", "sentencepiece>=0.2.1", "zstandard>=0.24"],
        "seqio": ["seqio>=0.0.20"],
        "notebooks": ["jupyter>=1.1", "matplotlib>=3.10"],
        "plot": ["matplotlib>=3.10"],
    },
)
