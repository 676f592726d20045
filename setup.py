"""Maps the top-level folders kernels/ and integrations/ into the package.

They install as guided_decode.kernels and guided_decode.integrations, so that nothing of ours
claims the import names `kernels` (Hugging Face's library) or `integrations`.
"""

from setuptools import find_packages, setup

MAPPED = ("kernels", "integrations")


def mapped_packages(folder: str) -> list[str]:
    """The folder and its sub-packages, by their installed names."""
    return [
        f"guided_decode.{name}"
        for name in (folder, *(f"{folder}.{sub}" for sub in find_packages(folder)))
    ]


setup(
    packages=[
        *find_packages(include=["guided_decode", "guided_decode.*"]),
        *(package for folder in MAPPED for package in mapped_packages(folder)),
    ],
    package_dir={f"guided_decode.{folder}": folder for folder in MAPPED},
)
