"""RULER (Hsieh et al., arXiv 2404.06654): its 13 task forms, generated here; nothing is downloaded for six of them."""
