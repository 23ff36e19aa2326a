"""Triton kernels for the operators of a model: templates, sizes, and what the compiled code is."""
