"""The toolbox beside the GlimpsePrune models: commands, training, data and evaluation."""
