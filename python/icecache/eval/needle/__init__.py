"""Needle tasks: synthetic long-context questions that the shipped model answers; retrieval under a budget."""

from __future__ import annotations

from icecache.eval.needle.model import load_needle, needle_path
from icecache.eval.needle.samples import Sample, make_samples
from icecache.eval.needle.tasks import TASKS

__all__ = ["TASKS", "Sample", "load_needle", "make_samples", "needle_path"]
