"""`icecache demo`: the shipped model answers from a long context, with its KV cache whole and under small budgets."""
