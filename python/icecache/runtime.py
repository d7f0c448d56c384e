"""`IceRuntime`: wrap a Hugging Face decoder so that it generates with its KV cache in host pages."""

from __future__ import annotations

from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING

import torch

from icecache.config import IceConfig
from icecache.errors import CacheStateError, ConfigError
from icecache.hf import RETRIEVAL, Engine, ModelHooks, adopt, decoder_for, register
from icecache.index.pool import shared_pool
from icecache.pages import Inserter, Offload, Stores, WholeKV
from icecache.policies import make_policy
from icecache.select import Charges, MaskPolicy, Services, TreeSearch, chooses_pages
from icecache.stats import Recorder, RuntimeStats, Trace
from icecache.transfer import Staging

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel
    from transformers.cache_utils import Cache


_NEVER = 2**40
"""A length below which everything is."""


class IceRuntime:
    """Handle of a wrapped model; undo with :meth:`unwrap` or by leaving its ``with`` block.

    The model's own ``generate`` works as before, with or without ``past_key_values``.

    Examples
    --------
    >>> with IceRuntime.wrap(model, budget=256) as runtime:
    ...     tokens = model.generate(**inputs, max_new_tokens=100)
    ...     print(runtime.stats())
    """

    def __init__(self, model: PreTrainedModel, config: IceConfig, policy: str | MaskPolicy) -> None:
        """Use :meth:`wrap`."""
        chosen = make_policy(policy, config)
        masks = chosen.masks
        self.policy = policy if isinstance(policy, str) else policy.name
        if config.reuse == 1:
            config = replace(config, reuse=chosen.reuse)
        if config.reuse > 1 and not chooses_pages(chosen.selector):
            msg = f"reuse must be 1 for policy {self.policy!r}, which chooses no pages, got {config.reuse}"
            raise ConfigError(msg)
        if masks is not None and masks.always_dense:
            config = replace(config, dense_below=_NEVER)
        self.model, self.config, self._chosen = model, config, chosen
        self._recorder = Recorder()
        estimates = config.estimate_unread and isinstance(chosen.selector, TreeSearch)
        pool, inserter = shared_pool(config.threads), Inserter()
        self._services = Services(
            pool=pool,
            stores=Stores(config.host_memory, pool, serve=inserter.serve, value_means=estimates),
            staging=Staging(),
            recorder=self._recorder,
            selector=chosen.selector,
            n_pages=config.retrieved_pages,
            candidates=config.candidates,
            offload=Offload(pool, config.reuse),
            inserter=inserter,
        )
        register()
        self._engine = Engine(
            config=config,
            layout=chosen.layout,
            services=self._services,
            sparse_chunks=config.sparse_prefill
            or not chosen.layout.keeps_middle
            or (masks is not None and masks.forgets),
            masks=masks,
        )
        self._hooks = ModelHooks(model, self._engine)
        decoder = decoder_for(model, self._engine)
        if decoder is not None:
            self._hooks.decode_with(decoder)

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        config: IceConfig | None = None,
        *,
        policy: str | MaskPolicy = "icecache",
        **overrides: object,
    ) -> IceRuntime:
        """Wrap a model.

        Parameters
        ----------
        model : PreTrainedModel
            A decoder that dispatches its attention through ``AttentionInterface``. Multimodal models: the text decoder
            is served, towers keep their attention.
        config : IceConfig, optional
            Settings; the defaults of :class:`IceConfig` otherwise.
        policy : str or MaskPolicy, default="icecache"
            What chooses the tokens that are attended; see :func:`icecache.policies.make_policy`.
        **overrides
            Fields of the config to replace.

        Raises
        ------
        ConfigError
            If a setting is out of range or unknown.
        UnsupportedModelError
            If the model cannot be served; it is left untouched.
        CacheStateError
            If the model is wrapped already.
        """
        base = config or IceConfig()
        try:
            settings = replace(base, **overrides)  # type: ignore[arg-type]
        except TypeError as error:
            unknown = sorted(set(overrides) - set(IceConfig.__dataclass_fields__))
            msg = f"unknown settings: {', '.join(unknown)}"
            raise ConfigError(msg) from error
        return cls(model, settings, policy)

    def unwrap(self) -> PreTrainedModel:
        """Restore the model exactly and return it; caches made by this runtime are dead afterwards. Idempotent."""
        if not self._engine.closed:
            self._engine.closed = True
            self._hooks.remove()
            self._services.offload.close()
            self._services.stores.close()
            self._services.inserter.close()
        return self.model

    def __enter__(self) -> IceRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unwrap()

    @property
    def layer_plan(self) -> tuple[str, ...]:
        """Per layer: "retrieval", or the class name of the ordinary cache layer it keeps."""
        return tuple(self._hooks.plan)

    @property
    def layer_groups(self) -> tuple[tuple[int, ...], ...]:
        """Retrieval layers that share pages (`reuse`), each group with its leader first."""
        return tuple(self._hooks.groups())

    @property
    def trace(self) -> Trace | None:
        """Called with a :class:`icecache.stats.TraceEvent` per layer and decode step; None: nothing is recorded."""
        return self._services.trace

    @trace.setter
    def trace(self, trace: Trace | None) -> None:
        self._services.trace = trace

    def generate(self, *args: object, **kwargs: object) -> object:
        """Call ``model.generate`` with the same arguments."""
        self._check_open()
        return self.model.generate(*args, **kwargs)

    def new_cache(self) -> DynamicCache:
        """Give an empty cache for several turns: pass it as ``past_key_values``."""
        self._check_open()
        return self._hooks.new_cache()

    def adopt(self, cache: Cache, *, attention_mask: torch.Tensor | None = None) -> DynamicCache:
        """Make a cache of ours from a filled one, which stays usable.

        A plain ``DynamicCache`` (a dense prefill of this model, say) is paged and indexed; a cache of another runtime
        on the same model is forked copy-on-write when the sink is the same and the window no wider here, so one prefill
        and index serve several budgets.

        Parameters
        ----------
        cache : Cache
            As above.
        attention_mask : torch.Tensor, optional
            (n_rows, n_positions), 0 marks the padding of a plain cache, or of one of ours that is still dense.

        Raises
        ------
        CacheStateError
            If the cache does not fit this runtime; the message says what differs.
        BadTensorError, PoolExhaustedError
            As for a prefill.
        """
        self._check_open()
        with torch.no_grad():
            return adopt(self._hooks, cache, attention_mask)

    def stats(self) -> RuntimeStats:
        """Counters since ``wrap`` or :meth:`reset_stats`. Waits for the device.

        Raises
        ------
        EngineError
            If the last decode step had failed.
        """
        if self._hooks.decoder is not None:
            self._hooks.decoder.settle()
        recorder, layers = self._recorder, self._engine.live_layers()
        mass = sum(float(held) for held in list(self._services.mass.values()))
        pages = [layer.pages for layer in layers if layer.pages is not None]
        whole = [layer.kept for layer in layers if isinstance(layer.kept, WholeKV)]
        charged = self._services.charges.totals()
        n_attended = recorder.attended_n + charged.n_queries
        n_loaded = recorder.attended_n + charged.n_heads
        extremes = [
            (r.attended_min, r.attended_max)
            for r, n in ((recorder, recorder.attended_n), (charged, charged.n_queries))
            if n
        ]
        dense = [pair for layer in layers if (pair := layer.dense_pair()) is not None]
        return RuntimeStats(
            steps=recorder.steps,
            attended_mean=(recorder.attended_sum + charged.attended_sum) / n_attended if n_attended else 0.0,
            attended_min=min((low for low, _ in extremes), default=0),
            attended_max=max((high for _, high in extremes), default=0),
            loaded_mean=(recorder.attended_sum + charged.loaded_sum) / n_loaded if n_loaded else 0.0,
            generated_mean=charged.generated_sum / charged.n_queries if charged.n_queries else float("nan"),
            generated_kept=self._chosen.generated_kept,
            dense_layers=self._dense_layers(),
            parameters=self._services.charges.described(),
            pages_read=recorder.pages_read,
            bytes_to_device=recorder.bytes_to_device,
            bytes_to_host=recorder.bytes_to_host,
            summary_bytes=0 if self._hooks.decoder is None else self._hooks.decoder.summary_bytes(),
            device_bytes=sum(p.near.nbytes() for p in pages)
            + sum(k.nbytes + v.nbytes for k, v in dense)
            + sum(w.nbytes() for w in whole),
            host_bytes=sum(store.used_bytes() for store in {id(p.store): p.store for p in pages}.values()),
            index_bytes=sum(p.index_bytes() for p in pages),
            ms=dict(recorder.ms),
            mass_kept=mass / recorder.mass_n if recorder.mass_n else float("nan"),
        )

    def _dense_layers(self) -> tuple[int, ...]:
        """Layers that attend to everything: those of the config, and those of the policy itself."""
        plan = self._hooks.plan
        if self._chosen.masks is None:
            return tuple(sorted(self._hooks.dense_layers))
        if self._chosen.masks.always_dense:
            return tuple(i for i, kind in enumerate(plan) if kind == RETRIEVAL)
        return tuple(sorted(self._hooks.dense_layers | set(self._chosen.masks.own_dense_layers(len(plan)))))

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._recorder = self._services.recorder = Recorder()
        self._services.mass.clear()
        self._services.charges = Charges()

    def _check_open(self) -> None:
        if self._engine.closed:
            msg = "this runtime was unwrapped; wrap the model again"
            raise CacheStateError(msg)
