"""Triton kernels, and nothing else. Installed as fastanila.kernels; imports triton only."""
