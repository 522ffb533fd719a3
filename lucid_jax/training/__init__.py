"""How the shipped model and its draft were made: the corpus, training, distillation.

Part of a checkout, of no wheel and no sdist; needs `lucid-jax[training]`.
"""
