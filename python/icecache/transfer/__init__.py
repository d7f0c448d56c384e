"""From pages on the host to tensors on the compute device: plain copies through reusable staging memory."""

from icecache.transfer.staging import Fetched as Fetched
from icecache.transfer.staging import Staging as Staging
