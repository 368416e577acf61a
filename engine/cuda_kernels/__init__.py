"""Triton kernels of the CUDA engine. One file per family; each ends with the functions that launch it."""
