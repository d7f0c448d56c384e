"""Data and measurements that the benchmarks share."""
