"""Attention on TPUs: a Pallas kernel for a few queries or a prompt's, and the backend that calls it."""
