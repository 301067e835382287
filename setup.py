"""Packaging of megatron-meap; the settings of its tools (pytest, ruff, mypy) stand in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "megatron_meap" / "__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)
# SciPy: intervals and tests; Jinja: the report; httpx: the judge's endpoint.
EVALUATION = ["lm_eval[ruler]>=0.4.13", "scipy>=1.15", "jinja2", "httpx"]

setup(
    name="megatron-meap",
    version=VERSION,
    description="Mask-Enhanced Autoregressive Prediction (MEAP) pretraining on NVIDIA's Megatron Core",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.12",  # as megatron-core 0.19
    packages=find_packages(include=["megatron_meap", "megatron_meap.*"]),
    package_data={"megatron_meap": ["py.typed", "evaluation/tasks/*.yaml", "evaluation/reporting/*.jinja"]},
    install_requires=[
        "torch>=2.6",
        "megatron-core[training]>=0.19.2,<0.20",
        "numpy",
        # Conversion to and from Hugging Face; protobuf reads SentencePiece's model file.
        "transformers>=4.57",
        "tokenizers",
        "safetensors",
        "protobuf",
        "sentencepiece",
        # Preprocessing: the fastest exact tokenizer, JSON, compressed and columnar input, the progress bar.
        "gigatoken>=0.10,<0.11",  # its exactness was examined for this version
        "orjson",
        "zstandard",
        "pyarrow",
        "tqdm",
        # The picture of the loss curves.
        "matplotlib",
    ],
    extras_require={
        # NVIDIA Apex, where wanted, is a source build (README.md): PyPI's "apex" is an unrelated package.
        "gpu": ["transformer-engine[pytorch,core_cu13]>=2.9"],
        "eval": EVALUATION,
        "logging": ["tensorboard", "wandb"],
        "dev": ["pytest", "hypothesis", "ruff", "mypy", "tensorboard", *EVALUATION],
    },
)
