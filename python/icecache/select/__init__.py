"""Which pages (or, for an oracle, tokens) of the host are read at a decode step."""

from icecache.select.base import Read as Read
from icecache.select.base import Request as Request
from icecache.select.base import Selector as Selector
from icecache.select.base import Services as Services
from icecache.select.base import read_groups as read_groups
from icecache.select.charges import Charges as Charges
from icecache.select.masks import Baseline as Baseline
from icecache.select.masks import Chosen as Chosen
from icecache.select.masks import MaskPolicy as MaskPolicy
from icecache.select.masks import Needs as Needs
from icecache.select.masks import Prompt as Prompt
from icecache.select.masks import StepView as StepView
from icecache.select.masks import best as best
from icecache.select.masks import capped as capped
from icecache.select.masks import group_weight as group_weight
from icecache.select.masks import in_pages as in_pages
from icecache.select.masks import of_pages as of_pages
from icecache.select.pages import RandomPages as RandomPages
from icecache.select.pages import TreeSearch as TreeSearch
from icecache.select.pages import chooses_pages as chooses_pages
