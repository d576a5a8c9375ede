"""Benchmarks: the operator, the chains and the updates beside other ways to do the same work.

Importing the package makes a checkout that is not installed find its kernels: see `checkout.link_kernels`.
"""

from .checkout import link_kernels

link_kernels()
