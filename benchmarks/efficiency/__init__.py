"""Speed and memory of a pruned generation beside the stock model of the same weights.

python -m benchmarks.efficiency --help
"""
