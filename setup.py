from setuptools import setup

# The folder kernels/ lies beside the library and installs inside it: a top-level package named `kernels` would
# collide with another project's.
setup(
    packages=["fastanila", "fastanila.kernels"],
    package_dir={"fastanila": "fastanila", "fastanila.kernels": "kernels"},
)
