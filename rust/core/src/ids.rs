//! Names of pages.
#![forbid(unsafe_code)]

/// Number of a page in its store; reused after the page was freed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// A page and how often its memory had been freed before: the pair is never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRef {
    /// Place in the store.
    pub id: PageId,
    /// Number of earlier lives of this place.
    pub generation: u32,
}

impl PageRef {
    /// Generation of pages in a mapped file: they belong to no store and are never reused.
    pub(crate) const MAPPED: u32 = u32::MAX;
}
