"""What a deeper base that answers several kinds of questions says about pruning, kind by kind."""
