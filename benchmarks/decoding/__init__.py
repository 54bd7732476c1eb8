"""The parts of `benchmarks/decode.py`: each measures one side of decoding and returns a `report.Part`."""
