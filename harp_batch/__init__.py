"""harp-batch: distributed batch evaluation of HARP decoding (arXiv 2412.07282)."""

__version__ = "0.1.0"
