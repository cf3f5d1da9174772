"""The whole way of a user at a real checkpoint's size, with random weights.

    python -m benchmarks.rehearsal --work FOLDER --geometry 3b

writes a base and an official glimpse as their repositories on the Hub hold them, and runs on them
the commands that a user types, each in a process of its own, with what it took in seconds, memory
and disk.
"""
