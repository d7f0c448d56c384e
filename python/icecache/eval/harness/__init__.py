"""lm-evaluation-harness as the engine: its tasks under our policies, and our tasks inside it.

`harness.model` and `harness.tasks` import `lm_eval`, which takes seconds and comes with `pip install icecache[eval]`.
"""
