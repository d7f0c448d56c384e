"""Names for ways to choose what is read: ours, and the baselines and oracles it is compared with."""

from icecache.policies.policy import POLICIES as POLICIES
from icecache.policies.policy import Policy as Policy
from icecache.policies.policy import make_policy as make_policy
