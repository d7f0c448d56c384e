"""Where keys and values live: sink and window on the compute device, the rest in pages on the host."""

from icecache.pages.ahead import Inserter as Inserter
from icecache.pages.ahead import hand_over as hand_over
from icecache.pages.build import build as build
from icecache.pages.chunk import send_chunk as send_chunk
from icecache.pages.host import host_memory as host_memory
from icecache.pages.host import warn_if_pageable as warn_if_pageable
from icecache.pages.layer import LayerPages as LayerPages
from icecache.pages.layer import Layout as Layout
from icecache.pages.layer import drain as drain
from icecache.pages.layer import read_back as read_back
from icecache.pages.near import NearBuffer as NearBuffer
from icecache.pages.near import NearRow as NearRow
from icecache.pages.offload import Offload as Offload
from icecache.pages.padding import PaddingLog as PaddingLog
from icecache.pages.shelf import Choice as Choice
from icecache.pages.shelf import Shelf as Shelf
from icecache.pages.shelf import columns as columns
from icecache.pages.shelf import page_strides as page_strides
from icecache.pages.shelf import row_dim as row_dim
from icecache.pages.store import Stores as Stores
from icecache.pages.store import as_bytes as as_bytes
from icecache.pages.whole import RowIndex as RowIndex
from icecache.pages.whole import WholeKV as WholeKV
