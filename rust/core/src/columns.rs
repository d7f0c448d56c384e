//! A part of every row: pages may hold the keys and values of several layers side by side.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};
use crate::layout::PageLayout;
use crate::page::Row;

/// Bytes `start..start + len` of every row; a row is its key, followed by its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Columns {
    /// First byte.
    pub start: usize,
    /// Number of bytes.
    pub len: usize,
}

impl Columns {
    /// The whole key.
    #[must_use]
    pub fn key(layout: PageLayout) -> Self {
        Self { start: 0, len: layout.key_bytes() }
    }

    /// The whole value.
    #[must_use]
    pub fn value(layout: PageLayout) -> Self {
        Self { start: layout.key_bytes(), len: layout.value_bytes() }
    }

    /// Columns that lie in the key, or in the value.
    ///
    /// # Errors
    /// If they do neither; `name` is the argument that is named then.
    pub(crate) fn checked(self, name: &'static str, layout: PageLayout) -> Result<Self> {
        let (key, row) = (layout.key_bytes(), layout.key_bytes() + layout.value_bytes());
        let limit = if self.start < key { key } else { row };
        let received = self.start.saturating_add(self.len);
        if received > limit { Err(Error::OutOfRange { name, limit, received }) } else { Ok(self) }
    }

    /// These bytes of a row.
    pub(crate) fn of<'a>(self, row: &Row<'a>) -> &'a [u8] {
        match self.start.checked_sub(row.key.len()) {
            None => &row.key[self.start..][..self.len],
            Some(start) => &row.value[start..][..self.len],
        }
    }
}
