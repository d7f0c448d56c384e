"""Ways to choose what is read: ours, and the baselines and oracles it is compared with."""

from icecache.policies.arkvale import ArkVale as ArkVale
from icecache.policies.dense import matched_dense_layers as matched_dense_layers
from icecache.policies.dense import published_dense_layers as published_dense_layers
from icecache.policies.full import Full as Full
from icecache.policies.full import Prefill as Prefill
from icecache.policies.h2o import H2O as H2O
from icecache.policies.magicpig import MagicPIG as MagicPIG
from icecache.policies.omnikv import OmniKV as OmniKV
from icecache.policies.page_oracle import PositionalPageOracle as PositionalPageOracle
from icecache.policies.paper import IceCachePaper as IceCachePaper
from icecache.policies.policy import POLICIES as POLICIES
from icecache.policies.policy import Policy as Policy
from icecache.policies.policy import make_policy as make_policy
from icecache.policies.pqcache import PQCache as PQCache
from icecache.policies.quest import Quest as Quest
from icecache.policies.sampling import OracleSampling as OracleSampling
from icecache.policies.snapkv import SnapKV as SnapKV
from icecache.policies.streaming import RenumberedStreaming as RenumberedStreaming
from icecache.policies.streaming import frequencies_of as frequencies_of
from icecache.policies.token_oracle import TokenOracle as TokenOracle
