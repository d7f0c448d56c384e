"""The seam to Hugging Face transformers: a cache layer, an attention function, a mask function, two hooks."""

from icecache.hf.adopt import adopt as adopt
from icecache.hf.attention import IMPLEMENTATION as IMPLEMENTATION
from icecache.hf.attention import register as register
from icecache.hf.cache import RetrievalLayer as RetrievalLayer
from icecache.hf.graph import decoder_for as decoder_for
from icecache.hf.hooks import ModelHooks as ModelHooks
from icecache.hf.step import Engine as Engine
from icecache.hf.support import RETRIEVAL as RETRIEVAL
from icecache.hf.support import text_config_of as text_config_of
