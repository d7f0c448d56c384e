"""A CUDA graph made of a list: operations with the very tensors they had when they were recorded.

Like a graph it repeats neither Python nor shapes, and refuses what waits for the device. Unlike a graph it also runs
what it records.
"""

from __future__ import annotations

import torch
from icecache.hf.segments import waits
from torch.utils._python_dispatch import TorchDispatchMode

FORBIDDEN = ()
"""Names of operations that wait within, which nobody sees from outside."""


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(func, args, kwargs) or str(func).removesuffix(".default").replace(".", "::", 1) in FORBIDDEN:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        output = func(*args, **kwargs)
        aliases = [x.alias_info for x in func._schema.returns]
        if not (aliases and all(x is not None and not x.is_write for x in aliases)):  # views stay views
            self.entries.append((func, args, kwargs, output))
        return output

    def replay(self):
        for func, args, kwargs, output in self.entries:
            again = func(*args, **kwargs)
            for old, new in zip(_tensors(output), _tensors(again), strict=True):
                if old is not new and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def _tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [x for x in output if isinstance(x, torch.Tensor)] if isinstance(output, (tuple, list)) else []


class TapeRecorder:
    """Records pieces on the CPU."""

    def __init__(self):
        self.pieces = []

    def begin(self):
        """Start a piece."""
        self._tape = _Tape()
        self._tape.__enter__()

    def end(self):
        """End it."""
        self._tape.__exit__(None, None, None)
        self.pieces.append(self._tape)
        return self._tape.replay
