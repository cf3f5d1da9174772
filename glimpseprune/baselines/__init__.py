"""Other ways to answer with fewer visual tokens, on the machinery that GlimpsePrune runs on.

A scoring rule is a small class with a pure function at its heart; where tokens are dropped (before
the decoder, inside it, or at the glimpse layer) is stated once for all rules.
"""
