"""GSM8K (Cobbe et al., arXiv 2110.14168): grade-school problems, answered by a chain of thought after examples."""
