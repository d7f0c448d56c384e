//! Where the arrays of a mailbox lie.
#![forbid(unsafe_code)]

use icecache_core::Dtype;

use crate::error::{Error, Result};

/// Alignment of every layer of every array: a line of the CPU and of a write over the bus.
pub(crate) const LINE: usize = 128;
/// Most bytes of a mailbox; far above any model, far below any overflow.
const MAX_BYTES: usize = 1 << 36;

/// Shape of a mailbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MailboxShape {
    /// Layers that search.
    pub layers: usize,
    /// Most rows of a batch.
    pub rows: usize,
    /// KV heads.
    pub heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Elements of a query.
    pub dim: usize,
    /// Most pages of an answer per (row, head).
    pub capacity: usize,
    /// Element type of the queries.
    pub dtype: Dtype,
}

/// One array of the mailbox: `layers` blocks, one per search layer (one for `ticket`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Array {
    /// Distance of layer 0 from the start of the mailbox, bytes.
    pub offset: usize,
    /// Distance between layers, bytes.
    pub stride: usize,
}

impl Array {
    pub(crate) fn at(self, layer: usize) -> usize {
        self.offset + layer * self.stride
    }
}

/// All arrays of a mailbox.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrays {
    pub(crate) ticket: Array,
    pub(crate) request: Array,
    pub(crate) answered: Array,
    pub(crate) timeout: Array,
    pub(crate) unit_answered: Array,
    pub(crate) queries: Array,
    pub(crate) table: Array,
    pub(crate) lse: Array,
    pub(crate) bytes: usize,
}

impl MailboxShape {
    /// A checked shape.
    ///
    /// # Errors
    /// If an axis is 0 or the mailbox would exceed 64 GiB.
    pub fn check(self) -> Result<Self> {
        let axes = [
            ("n_layers", self.layers),
            ("n_rows", self.rows),
            ("n_kv_heads", self.heads),
            ("group", self.group),
            ("key_dim", self.dim),
            ("capacity", self.capacity),
        ];
        let mut product: usize = 8;
        for (name, length) in axes {
            product = product.saturating_mul(length);
            if length == 0 || product > MAX_BYTES {
                let expected = "a positive number, and at most 64 GiB in all".to_owned();
                return Err(Error::Argument { name, expected, received: length.to_string() });
            }
        }
        Ok(self)
    }

    /// (row, head) pairs of a layer.
    #[must_use]
    pub fn units(&self) -> usize {
        self.rows * self.heads
    }

    /// Bytes of the queries of one unit.
    pub(crate) fn unit_query_bytes(&self) -> usize {
        self.group * self.dim * self.dtype.size()
    }

    pub(crate) fn arrays(&self) -> Arrays {
        let mut end = 0;
        let mut array = |layers: usize, bytes: usize| {
            let array = Array { offset: end, stride: bytes.next_multiple_of(LINE) };
            end += layers * array.stride;
            array
        };
        let (layers, units) = (self.layers, self.units());
        Arrays {
            ticket: array(1, 4),
            request: array(layers, 4),
            answered: array(layers, 4),
            timeout: array(layers, 4),
            unit_answered: array(layers, 4 * units),
            queries: array(layers, units * self.unit_query_bytes()),
            table: array(layers, 8 * units * self.capacity),
            lse: array(layers, 8 * units * self.group),
            bytes: end,
        }
    }

    /// The arrays by name, for whoever maps them.
    #[must_use]
    pub fn named_arrays(&self) -> [(&'static str, Array); 8] {
        let a = self.arrays();
        [
            ("ticket", a.ticket),
            ("request", a.request),
            ("answered", a.answered),
            ("timeout", a.timeout),
            ("unit_answered", a.unit_answered),
            ("queries", a.queries),
            ("table", a.table),
            ("lse", a.lse),
        ]
    }

    /// Bytes of the mailbox.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.arrays().bytes
    }
}
