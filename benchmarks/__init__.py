"""Benchmarks of the kernels and models; installed as `exafuse.benchmarks`."""
