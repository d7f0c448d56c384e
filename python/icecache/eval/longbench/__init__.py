"""LongBench v1 (Bai et al., arXiv 2308.14508): 21 sets in English, Chinese and code, real texts of 1k to 40k tokens."""
