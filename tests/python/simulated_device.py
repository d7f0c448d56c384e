"""A device made of one thread: it posts queries into a mailbox, waits for the answer, and reads pages by address."""

from __future__ import annotations

import ctypes
import threading
import time

import numpy as np
import torch
from icecache.transfer import ADDRESS_BITS, MailboxTensors

PAGE_TOKENS = 16


class SimulatedDevice:
    """Runs one step at a time, as a graph would: layer after layer, without the host.

    Parameters
    ----------
    tensors : MailboxTensors
        Its side of the mailbox.
    wait_s : float
        Bound of each wait, seconds.
    """

    def __init__(self, tensors: MailboxTensors, wait_s: float = 30.0) -> None:
        self.tensors, self.wait_s = tensors, wait_s
        self.tables: list[torch.Tensor] = [torch.zeros_like(table) for table in tensors.table]
        """Per layer the words of the last answer in time, as the device's own copy."""
        self._thread: threading.Thread | None = None

    def launch(self, ticket: int, queries: list[torch.Tensor]) -> None:
        """Start a step: `queries` (rows, H, G, D) of each layer."""
        self._thread = threading.Thread(target=self._run, args=(ticket, queries))
        self._thread.start()

    def synchronize(self) -> None:
        """Wait for the step."""
        assert self._thread is not None
        self._thread.join()

    def _run(self, ticket: int, queries: list[torch.Tensor]) -> None:
        signed = int(np.uint32(ticket).view(np.int32))
        for layer, posted in enumerate(queries):
            self.tensors.queries[layer, : len(posted)] = posted
            self.tensors.request[layer] = signed
            deadline = time.monotonic() + self.wait_s
            while int(self.tensors.answered[layer]) != signed:
                if time.monotonic() > deadline:
                    self.tensors.timeout[layer] = signed
                    break
                time.sleep(0)
            else:
                self.tables[layer] = self.tensors.table[layer].clone()


def read_pages(words: torch.Tensor, key_bytes: int, value_bytes: int) -> list[tuple[bytes, bytes]]:
    """Live (key, value) rows behind table words (C,), in the order of pages and slots."""
    rows = []
    for word in words.numpy().view(np.uint64).tolist():
        if word == 0:
            continue
        live, address = word >> ADDRESS_BITS, word & ((1 << ADDRESS_BITS) - 1)
        page = ctypes.string_at(address, PAGE_TOKENS * (key_bytes + value_bytes))
        for slot in range(PAGE_TOKENS):
            if live >> slot & 1:
                key, value = slot * key_bytes, PAGE_TOKENS * key_bytes + slot * value_bytes
                rows.append((page[key : key + key_bytes], page[value : value + value_bytes]))
    return rows
