"""Triton kernels sized to the retained experts. Imports torch and triton only."""
