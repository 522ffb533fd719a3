"""Attention over what a cache stores, and over plain arrays; both causal by position."""
