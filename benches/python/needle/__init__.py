"""Training of needle-3m, the model that ships with IceCache. Entry point: `benches/python/train_needle.py`."""
