"""Measurements of ratios, side by side in one process; not tests, and nothing of the product imports them."""
