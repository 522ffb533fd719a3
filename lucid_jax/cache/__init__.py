"""The pure core: layer states, their layouts, and the verbs over a tuple of them."""
