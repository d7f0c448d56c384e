"""IceCache: long-context LLM inference in a small, fixed amount of GPU memory."""
