"""Proof that the answers stay right under a budget: task generators, runners and scores."""
