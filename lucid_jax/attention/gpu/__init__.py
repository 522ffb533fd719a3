"""Attention on Hopper GPUs: a Mosaic GPU kernel for a few queries, and the backend that calls it."""
