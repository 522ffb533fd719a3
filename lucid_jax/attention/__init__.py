"""Attention over what a cache stores, and over plain arrays; both causal by position.

Backends that compute it are tried in an order per platform; `register` adds one.
"""

from lucid_jax.attention.backends import register
from lucid_jax.attention.mask import Mask
from lucid_jax.attention.protocol import Backend, NotMe
from lucid_jax.attention.softmax import Scores

__all__ = ["Backend", "Mask", "NotMe", "Scores", "register"]
