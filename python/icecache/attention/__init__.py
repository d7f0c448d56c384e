"""Attention over parts of a context, merged by log-sum-exp."""

from icecache.attention.attend import query_pieces as query_pieces
from icecache.attention.decode import decode_attention as decode_attention
from icecache.attention.device import DeviceStep as DeviceStep
from icecache.attention.device import StepShape as StepShape
from icecache.attention.device import shared_sizes as shared_sizes
from icecache.attention.device_search import DeviceSearch as DeviceSearch
from icecache.attention.inside import Inside as Inside
from icecache.attention.inside import causal as causal
from icecache.attention.loading import Loader as Loader
from icecache.attention.masked import masked_attention as masked_attention
from icecache.attention.masked import whole_attention as whole_attention
from icecache.attention.notes import Notes as Notes
from icecache.attention.notes import read_prompt as read_prompt
from icecache.attention.partial import Partial as Partial
from icecache.attention.partial import merge as merge
from icecache.attention.partial import partial_attention as partial_attention
from icecache.attention.partial import with_sink_logits as with_sink_logits
from icecache.attention.search import EngineSearch as EngineSearch
from icecache.attention.static_kv import KeptLayer as KeptLayer
from icecache.attention.static_kv import StaticKV as StaticKV
from icecache.attention.static_kv import StaticShape as StaticShape
from icecache.attention.stream import stream_attention as stream_attention
