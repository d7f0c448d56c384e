"""From pages on the host to the compute device: copies through staging memory, or a mailbox and pages read in place."""

from icecache.transfer.mailbox import ADDRESS_BITS as ADDRESS_BITS
from icecache.transfer.mailbox import MailboxShape as MailboxShape
from icecache.transfer.mailbox import MailboxTensors as MailboxTensors
from icecache.transfer.mailbox import open_mailbox as open_mailbox
from icecache.transfer.pieces import PageReader as PageReader
from icecache.transfer.pieces import read_blocks as read_blocks
from icecache.transfer.staging import Fetched as Fetched
from icecache.transfer.staging import Staging as Staging
