"""Training of the weights that GlimpsePrune adds to a base."""
