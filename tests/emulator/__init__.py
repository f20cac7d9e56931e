"""A CUDA execution model on the CPU: builds, controls and sanitized runs of the kernels."""
