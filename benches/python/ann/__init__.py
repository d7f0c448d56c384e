"""`icecache.Index` beside other nearest-neighbour libraries; the command is `benches/python/bench_ann.py`."""
