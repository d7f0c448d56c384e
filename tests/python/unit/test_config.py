"""Settings are checked once, and the message names field, value and range."""

from __future__ import annotations

import dataclasses

import pytest
from icecache import ConfigError, IceCacheError, IceConfig


def test_the_default_reads_thirteen_pages():
    config = IceConfig()
    assert (config.budget, config.sink_tokens, config.window, config.retrieved_pages) == (256, 16, 32, 13)
    assert IceConfig(budget=128).retrieved_pages == 5


@pytest.mark.parametrize(
    ("settings", "window", "pages"),
    [
        ({"budget": 64}, 16, 2),
        ({"budget": 48}, 16, 1),
        ({"budget": 80}, 32, 2),
        ({"budget": 64, "sink_tokens": 0}, 32, 2),
        ({"budget": 64, "window_tokens": 32}, 32, 1),
        ({"budget": 256, "window_tokens": 16}, 16, 14),
    ],
)
def test_the_default_window_shrinks_rather_than_leave_one_page(settings, window, pages):
    config = IceConfig(**settings)
    assert (config.window, config.retrieved_pages) == (window, pages)
    assert config.sink_tokens + config.window + 16 * config.retrieved_pages == config.budget


def test_another_budget_splits_anew():
    assert dataclasses.replace(IceConfig(budget=64), budget=256).window == 32


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("budget", 32, r"48, 64, \.\.\., got 32"),
        ("budget", 100, r"16 j with j >= 1.*got 100"),
        ("budget", 0, r"budget must be an integer in 1\.\.=.*got 0"),
        ("budget", 256.0, r"budget must be an integer.*got 256\.0"),
        ("budget", True, "budget must be an integer.*got True"),
        ("page_tokens", 32, "page_tokens must be 16, got 32"),
        ("sink_tokens", -1, r"sink_tokens must be an integer in 0\.\.=4096, got -1"),
        ("window_tokens", 0, r"window_tokens must be an integer in 1\.\.=65536, got 0"),
        ("dense_below", -5, "dense_below must be .* got -5"),
        ("dense_layers", (1, -2), "dense_layers must be .* got -2"),
        ("dense_layers", 1, "dense_layers must be a tuple of integers, got 1"),
        ("dense_layers", "01", "dense_layers must be a tuple of integers, got '01'"),
        ("host_memory", 0, "host_memory must be .* got 0"),
        ("threads", 0, r"threads must be an integer in 1\.\.=1024, got 0"),
        ("seed", -1, "seed must be .* got -1"),
        ("on_unsupported", "ignore", "on_unsupported must be 'error' or 'dense', got 'ignore'"),
    ],
)
def test_a_value_out_of_range_is_refused_with_field_value_and_range(field, value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        IceConfig(**{field: value})
    assert isinstance(caught.value, (IceCacheError, ValueError))


def test_a_config_cannot_change_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        IceConfig().budget = 7
    assert IceConfig(dense_layers=[1, 2]).dense_layers == (1, 2)
