"""Attention on TPUs: a Pallas kernel for a few queries, and the backend that calls it."""
