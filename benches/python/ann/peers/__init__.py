"""One adapter per library, made by name; a library is imported only in the process that measures it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

from ann.peers.base import Augmented, Centred, Peer
from ann.truth import Metric

_ANY: tuple[Metric, ...] = ("ip", "l2", "cosine")

#: Name of the package that an adapter needs.
_DISTRIBUTIONS = {
    "annoy_peer": "annoy",
    "faiss_peer": "faiss-cpu",
    "hnswlib_peer": "hnswlib",
    "lorann_peer": "lorann",
    "scann_peer": "scann",
    "svs_peer": "scalable-vs",
    "usearch_peer": "usearch",
    "voyager_peer": "voyager",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """How to make a peer.

    Attributes
    ----------
    module, factory : str
        Adapter module in this folder and the class in it.
    arguments : tuple[str, ...]
        Arguments of the class.
    wrap : Callable, optional
        Change of data around it.
    metrics : tuple[Metric, ...]
        Where it is run.
    """

    module: str
    factory: str
    arguments: tuple[str, ...] = ()
    wrap: Callable[[Peer], Peer] | None = None
    metrics: tuple[Metric, ...] = _ANY

    def version(self) -> str:
        """Version of the installed library; ours and NumPy's search come from this checkout."""
        try:
            return importlib.metadata.version(_DISTRIBUTIONS.get(self.module, self.module))
        except importlib.metadata.PackageNotFoundError:
            return "this checkout"

    def make(self) -> Peer:
        """Import the library and make an empty peer; `ImportError` where the library is absent."""
        module = importlib.import_module(f"ann.peers.{self.module}")
        peer: Peer = getattr(module, self.factory)(*self.arguments)
        return self.wrap(peer) if self.wrap else peer


PEERS: dict[str, Entry] = {
    "icecache": Entry("icecache_peer", "IceCache"),
    "icecache_bf16": Entry("icecache_peer", "IceCache", ("bfloat16",)),
    "brute": Entry("brute_peer", "Brute"),
    "faiss_flat": Entry("faiss_peer", "Faiss", ("flat",)),
    "hnswlib": Entry("hnswlib_peer", "Hnswlib"),
    "hnswlib_ctr": Entry("hnswlib_peer", "Hnswlib", (), Centred, ("ip",)),
    "hnswlib_aug": Entry("hnswlib_peer", "Hnswlib", (), Augmented, ("ip",)),
    "scann": Entry("scann_peer", "Scann"),
    "scann_ctr": Entry("scann_peer", "Scann", (), Centred, ("ip",)),
    "lorann": Entry("lorann_peer", "Lorann"),
    "lorann_ctr": Entry("lorann_peer", "Lorann", (), Centred, ("ip",)),
    "svs": Entry("svs_peer", "Svs"),
    "svs_ctr": Entry("svs_peer", "Svs", (), Centred, ("ip",)),
    "faiss_ivfpqfs": Entry("faiss_peer", "Faiss", ("ivfpqfs",)),
    "faiss_ivfpqfs_ctr": Entry("faiss_peer", "Faiss", ("ivfpqfs",), Centred, ("ip",)),
    "faiss_ivf": Entry("faiss_peer", "Faiss", ("ivf",)),
    "faiss_ivf_ctr": Entry("faiss_peer", "Faiss", ("ivf",), Centred, ("ip",)),
    "usearch": Entry("usearch_peer", "USearch"),
    "usearch_ctr": Entry("usearch_peer", "USearch", (), Centred, ("ip",)),
    "voyager": Entry("voyager_peer", "Voyager"),
    "faiss_hnsw": Entry("faiss_peer", "Faiss", ("hnsw",)),
    "faiss_hnsw_ctr": Entry("faiss_peer", "Faiss", ("hnsw",), Centred, ("ip",)),
    "annoy": Entry("annoy_peer", "Annoy"),
}
