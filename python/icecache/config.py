"""Settings of one wrapped model: frozen, validated once, passed explicitly."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from icecache.errors import ConfigError

PAGE_TOKENS = 16
"""Tokens of a page: fixed by the page store's layout."""

WINDOW_TOKENS, NARROW_WINDOW_TOKENS = 32, 16
"""Newest tokens that stay near by default, and how many where the wider window would leave one page to read.

With sink 16 and window 32 a budget of 64 reads one page. Needle models, setup B, 24 samples (docs/LOG.md): two pages
took one of them from .42 to 1.00 on a pointer chase at 64 tokens; at 128 and 256 the two windows are alike."""

MIN_CANDIDATES = 112
"""Fewest pages scored from their keys, whatever is asked for: the index's own default."""

CANDIDATES_PER_PAGE = 16
"""Pages scored from their keys by default, per page read: matters where more than 12 pages are read."""

LEAST_CANDIDATES = 192
"""Fewest pages scored from their keys by default.

What a sharp query wants can be one key far from the mean of its page, so pages are ranked by one bit per element of
every key. On trained models with 1,020 pages and two pages read the worst query lost .07 of four heads' attention with
192 candidates; ranked by their means, such a page stood as low as 896th (docs/LOG.md)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IceConfig:
    """How much of the context attention may read at each decode step, and where the rest is kept.

    Parameters
    ----------
    budget : int, default=256
        Tokens attended per KV head and decode step: ``sink_tokens + window + 16 j`` with ``j >= 1`` retrieved pages.
        The newest token, and up to 15 tokens that wait to enter the index, come on top and are reported.
    page_tokens : int, default=16
        Tokens per page. Only 16 in this version.
    candidates_per_page : int or None, default=None
        Pages that a search on the host scores exactly per page read, at least 112 in all. Sets what that search costs
        beyond one look at a bit per element of every key: it reads the keys of so many pages. None: 16 per page and at
        least 192 in all, which finds the pages that scoring all of them would find, but for small trades between the
        query heads of a group (docs/LOG.md). 1 to 4096.
    sink_tokens : int, default=16
        First tokens of a sequence; always on the compute device. 0 to 4096.
    window_tokens : int or None, default=None
        Newest tokens of a sequence; always on the compute device. 1 to 65536. None: 32, or 16 where 32 would leave
        less than two pages to read (a budget of 64); `window` says which.
    reuse : int, default=1
        Layers that share pages. Of `reuse` retrieval layers in a row (layers of other kinds and `dense_layers` do not
        count) the first one packs its keys into pages and searches; the others store their own keys and values in the
        same order and read the pages that the first one has chosen. Packing and searching are done once for all of
        them, so both get cheaper; what is read gets worse, the more the less the layers attend alike. 1 to 64.
    estimate_unread : bool, default=False
        Add to the output of attention an estimate of the pages that are not read: each page's estimated share of the
        softmax times its mean value, which takes a byte per page and element of a value on the host and half a byte
        on the device. False: they are left out, and the tokens that are read share all of the softmax, as in most
        published methods. On needle models answers are nearly those of full attention with it; a step of an 8B model
        at 36k takes .28 ms more on an H200 (docs/LOG.md). Needs ``reuse=1``; policies that do not search pages have
        nothing to estimate.
    dense_layers : tuple of int, default=()
        Layers that keep an ordinary dense KV cache; in a CUDA graph with room for an eighth more tokens.
    dense_below : int, default=1024
        While a sequence (padding included) is shorter than this, its layers keep everything on the compute device and
        use the model's own attention, bit for bit. 0 switches this off.
    sparse_prefill : bool, default=False
        Process a later chunk of the prompt (a second turn, say) as if its tokens were decoded one by one. By default
        such a chunk attends to the whole context exactly, streamed from the host.
    host_memory : int or None, default=None
        Limit of the page store in bytes, second bits of summaries in host memory included (`search_bits`); None: no
        limit.
    threads : int or None, default=None
        Threads of the index; None: ``ICECACHE_NUM_THREADS`` or the cores this process may use.
    seed : int, default=0
        Seed of policies that draw at random. Not negative.
    decode : {"auto", "eager"}, default="auto"
        "auto": on a CUDA device a decode step is one CUDA graph that reads pages in place, wherever model and machine
        allow it (a warning says why not). "eager": always op by op, with selected pages copied.
    search : {"auto", "gpu", "cpu"}, default="auto"
        Where a decode step in a CUDA graph chooses its pages. "gpu": on the device, from summaries that it keeps of
        all pages; nothing waits for the host. "cpu": worker threads search the index, with no memory on the device.
        "auto": "gpu". Where summaries do not fit, the host searches, with a warning. Steps that run op by op always
        search on the host.
    search_bits : {1, 2} or None, default=None
        How many of the two bits per element of a key that summaries have lie on the device: 1 takes 4.4 % of the keys'
        and values' bytes there (128 dimensions, 16-bit types) and 3.1 % in page-locked host memory, 2 take 7.5 % on
        the device, where up to some 128k tokens the search is faster. None: 2 while that takes at most 1 GiB, then 1.
    search_memory : int or None, default=None
        Most bytes of summaries on the device; None: no limit.
    on_unsupported : {"error", "dense"}, default="error"
        What to do with a layer whose attention cannot be served: raise, or keep it dense (lossless).

    Raises
    ------
    ConfigError
        If a field is out of range; the message names the field, its value and the range.
    """

    budget: int = 256
    page_tokens: int = PAGE_TOKENS
    candidates_per_page: int | None = None
    sink_tokens: int = 16
    window_tokens: int | None = None
    reuse: int = 1
    estimate_unread: bool = False
    dense_layers: tuple[int, ...] = ()
    dense_below: int = 1024
    sparse_prefill: bool = False
    host_memory: int | None = None
    threads: int | None = None
    seed: int = 0
    decode: Literal["auto", "eager"] = "auto"
    search: Literal["auto", "gpu", "cpu"] = "auto"
    search_bits: Literal[1, 2] | None = None
    search_memory: int | None = None
    on_unsupported: Literal["error", "dense"] = "error"

    def __post_init__(self) -> None:
        if isinstance(self.dense_layers, str) or not isinstance(self.dense_layers, Collection):
            msg = f"dense_layers must be a tuple of integers, got {self.dense_layers!r}"
            raise ConfigError(msg)
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if self.page_tokens != PAGE_TOKENS:
            msg = f"page_tokens must be {PAGE_TOKENS}, got {self.page_tokens!r}"
            raise ConfigError(msg)
        if self.candidates_per_page is not None:
            _check_int("candidates_per_page", self.candidates_per_page, 1, 4096)
        _check_int("sink_tokens", self.sink_tokens, 0, 4096)
        if self.window_tokens is not None:
            _check_int("window_tokens", self.window_tokens, 1, 65536)
        _check_int("reuse", self.reuse, 1, 64)
        _check_int("dense_below", self.dense_below, 0, 2**40)
        _check_int("seed", self.seed, 0, 2**63 - 1)
        if not isinstance(self.estimate_unread, bool):
            msg = f"estimate_unread must be True or False, got {self.estimate_unread!r}"
            raise ConfigError(msg)
        if self.estimate_unread and self.reuse > 1:
            msg = f"estimate_unread must be False with reuse > 1: followers do not search, got reuse={self.reuse}"
            raise ConfigError(msg)
        for layer in self.dense_layers:
            _check_int("dense_layers", layer, 0, 2**20)
        if self.host_memory is not None:
            _check_int("host_memory", self.host_memory, 1, 2**62)
        if self.threads is not None:
            _check_int("threads", self.threads, 1, 1024)
        if self.decode not in ("auto", "eager"):
            msg = f"decode must be 'auto' or 'eager', got {self.decode!r}"
            raise ConfigError(msg)
        if self.on_unsupported not in ("error", "dense"):
            msg = f"on_unsupported must be 'error' or 'dense', got {self.on_unsupported!r}"
            raise ConfigError(msg)
        self._check_budget()
        self._check_search()

    def _check_search(self) -> None:
        if self.search not in ("auto", "gpu", "cpu"):
            msg = f"search must be 'auto', 'gpu' or 'cpu', got {self.search!r}"
            raise ConfigError(msg)
        if self.search_bits is not None:
            _check_int("search_bits", self.search_bits, 1, 2)
        if self.search_memory is not None:
            _check_int("search_memory", self.search_memory, 1, 2**62)

    def _check_budget(self) -> None:
        _check_int("budget", self.budget, 1, 2**31)
        kept = self.sink_tokens + self.window
        if self.budget < kept + PAGE_TOKENS or (self.budget - kept) % PAGE_TOKENS:
            msg = (
                f"budget must be sink_tokens + window + {PAGE_TOKENS} j with j >= 1, that is "
                f"{kept + PAGE_TOKENS}, {kept + 2 * PAGE_TOKENS}, ..., got {self.budget}"
            )
            raise ConfigError(msg)

    @property
    def candidates(self) -> int:
        """Pages a search scores from their keys."""
        if self.candidates_per_page is None:
            return max(LEAST_CANDIDATES, CANDIDATES_PER_PAGE * self.retrieved_pages)
        return max(MIN_CANDIDATES, self.candidates_per_page * self.retrieved_pages)

    @property
    def retrieved_pages(self) -> int:
        """Pages read per KV head and decode step."""
        return (self.budget - self.sink_tokens - self.window) // PAGE_TOKENS

    @property
    def window(self) -> int:
        """Newest tokens that stay near: `window_tokens`, or what the budget leaves room for."""
        if self.window_tokens is not None:
            return self.window_tokens
        roomy = self.budget >= self.sink_tokens + WINDOW_TOKENS + 2 * PAGE_TOKENS
        return WINDOW_TOKENS if roomy else NARROW_WINDOW_TOKENS


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        msg = f"{field} must be an integer in {low}..={high}, got {value!r}"
        raise ConfigError(msg)
