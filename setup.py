from setuptools import find_packages, setup

# The folder kernels/ lies beside the library and installs inside it: a top-level package named `kernels` would
# collide with another project's.
setup(
    packages=[*find_packages(include=["fastanila", "fastanila.*"], exclude=["fastanila.kernels"]), "fastanila.kernels"],
    package_dir={"fastanila": "fastanila", "fastanila.kernels": "kernels"},
)
