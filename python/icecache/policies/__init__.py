"""Ways to choose what is read: ours, and the baselines and oracles it is compared with."""

from icecache.policies.dense import matched_dense_layers as matched_dense_layers
from icecache.policies.dense import published_dense_layers as published_dense_layers
from icecache.policies.full import Full as Full
from icecache.policies.full import Prefill as Prefill
from icecache.policies.policy import POLICIES as POLICIES
from icecache.policies.policy import Policy as Policy
from icecache.policies.policy import make_policy as make_policy
from icecache.policies.quest import Quest as Quest
from icecache.policies.snapkv import SnapKV as SnapKV
from icecache.policies.token_oracle import TokenOracle as TokenOracle
