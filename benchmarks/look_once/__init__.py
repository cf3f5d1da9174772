"""Several questions about one image: a look beside whole prompts and a plain prefix cache.

python -m benchmarks.look_once --help
"""
