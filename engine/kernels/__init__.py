"""Operators of our own for ONNX Runtime, in C, compiled for the machine they run on."""
