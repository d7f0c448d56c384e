"""Which pages (or, for an oracle, tokens) of the host are read at a decode step."""

from icecache.select.base import Read as Read
from icecache.select.base import Request as Request
from icecache.select.base import Selector as Selector
from icecache.select.base import Services as Services
from icecache.select.base import read_groups as read_groups
from icecache.select.pages import RandomPages as RandomPages
from icecache.select.pages import TreeSearch as TreeSearch
from icecache.select.tokens import TokenOracle as TokenOracle
