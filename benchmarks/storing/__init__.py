"""The parts of `benchmarks/store.py`: what is stored, where, and what is measured of it."""
