"""Statistics as pure functions on plain values: intervals, paired comparisons, metric rows."""
