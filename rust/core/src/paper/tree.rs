//! The tree of one KV head: its parts, and what can be asked without a search.
//!
//! Invariants, checked by [`Mdci::validate`]: every live token is in exactly one leaf, at the slot its leaf says, and
//! among the children of that leaf's cell; every live token above level 0, and nobody else, has a cell; no level below
//! the top is empty; a list is in projection order and its leaves are its runs.
#![forbid(unsafe_code)]

use std::collections::HashMap;

use super::cell::Cell;
use super::ids::{CellId, LeafId, Slab, TokenId};
use super::leaf::Leaf;
use super::lift::Direction;
use super::options::MdciOptions;
use super::promotion::Promotion;
use crate::arena::PageStore;
use crate::error::Result;
use crate::ids::PageRef;
use crate::page::Row;
use crate::sync::Arc;

/// What happened to a tree so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MdciCounters {
    /// Tokens inserted one by one.
    pub inserts: u64,
    /// Tokens removed.
    pub removes: u64,
    /// Full leaves split in two by an insert.
    pub splits: u64,
    /// Leaves written again to reclaim dead slots, or merged with or refilled from a neighbour.
    pub repacks: u64,
    /// Tokens that a promoted token took over.
    pub steals: u64,
    /// Level-0 tokens whose parent the anchor shortcut found.
    pub anchored: u64,
    /// Inner products computed by writes.
    pub distances: u64,
}

/// Where a token is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token {
    /// `None` once removed.
    pub(super) leaf: Option<LeafId>,
    /// Squared norm of the key.
    pub(super) square: f32,
}

/// The published multi-level DCI over the keys of one KV head, with the leaves of its lists as pages.
#[derive(Debug)]
pub struct Mdci {
    pub(super) store: Arc<PageStore>,
    pub(super) options: MdciOptions,
    pub(super) direction: Direction,
    pub(super) promotion: Promotion,
    /// `M`: largest squared norm of a key since the tree was last empty.
    pub(super) max_square: f32,
    /// By token id.
    pub(super) tokens: Vec<Token>,
    pub(super) n_live: usize,
    pub(super) cells: Slab<Cell>,
    pub(super) root: CellId,
    /// Cell of every live token above level 0.
    pub(super) cell_of: HashMap<TokenId, CellId>,
    /// Cells whose children are on a level; the root alone for the top level.
    pub(super) levels: Vec<Vec<CellId>>,
    pub(super) leaves: Slab<Leaf>,
    pub(super) counters: MdciCounters,
}

impl Mdci {
    /// An empty tree over pages of `store`.
    ///
    /// # Errors
    /// If an option lies outside its range.
    pub fn new(store: Arc<PageStore>, options: MdciOptions) -> Result<Self> {
        options.check()?;
        let mut cells = Slab::new();
        let root = CellId(cells.add(Cell::new(None, 0, 0.0)));
        Ok(Self {
            direction: Direction::new(store.layout().key_dim, options.seed),
            promotion: Promotion::new(options.first_ratio, options.upper_ratio),
            store,
            options,
            max_square: 0.0,
            tokens: Vec::new(),
            n_live: 0,
            cells,
            root,
            cell_of: HashMap::new(),
            levels: Vec::new(),
            leaves: Slab::new(),
            counters: MdciCounters::default(),
        })
    }

    /// Live tokens.
    #[must_use]
    pub fn len(&self) -> usize {
        self.n_live
    }

    /// Whether no token is live.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n_live == 0
    }

    /// The id the next token gets: tokens that ever came.
    #[must_use]
    pub fn next_token(&self) -> TokenId {
        TokenId(self.tokens.len() as u32)
    }

    /// Store of the pages.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// Number of pages; none is empty.
    #[must_use]
    pub fn n_pages(&self) -> usize {
        self.leaves.len()
    }

    /// Live tokens per level, finest first.
    #[must_use]
    pub fn level_counts(&self) -> &[usize] {
        self.promotion.counts()
    }

    /// All pages with their live tokens in slot order, in no particular order of pages.
    pub fn pages(&self) -> impl Iterator<Item = (PageRef, Vec<TokenId>)> {
        self.leaves.iter().map(|(_, leaf)| (leaf.page_ref(), leaf.tokens().map(|(_, token)| token).collect()))
    }

    /// The page of a live token.
    #[must_use]
    pub fn page_of(&self, token: TokenId) -> Option<PageRef> {
        Some(self.leaf(self.tokens.get(token.0 as usize)?.leaf?).page_ref())
    }

    /// The level of a live token, 0 the finest.
    #[must_use]
    pub fn level_of(&self, token: TokenId) -> Option<usize> {
        Some(self.cell(self.leaf(self.tokens.get(token.0 as usize)?.leaf?).cell).level)
    }

    /// The parent of a live token; `None` on the top level.
    #[must_use]
    pub fn parent_of(&self, token: TokenId) -> Option<TokenId> {
        self.cell(self.leaf(self.tokens.get(token.0 as usize)?.leaf?).cell).token
    }

    /// Key and value bytes of a live token.
    #[must_use]
    pub fn row(&self, token: TokenId) -> Option<(&[u8], &[u8])> {
        let row = self.live_row(token)?;
        Some((row.key, row.value))
    }

    /// Bytes of the index beside its pages.
    #[must_use]
    pub fn index_bytes(&self) -> usize {
        let cells: usize = self.cells.iter().map(|(_, cell)| cell.heap_bytes()).sum();
        let levels: usize = self.levels.iter().map(|cells| cells.capacity() * size_of::<CellId>()).sum();
        // A leaf's lease owns one page reference on the heap.
        let leases = self.leaves.len() * size_of::<PageRef>();
        // A map of `c` slots keeps a control byte beside each.
        let map = self.cell_of.capacity() * (size_of::<(TokenId, CellId)>() + 1);
        size_of::<Self>()
            + self.tokens.capacity() * size_of::<Token>()
            + self.cells.heap_bytes()
            + cells
            + levels
            + self.leaves.heap_bytes()
            + leases
            + map
            + self.direction.heap_bytes()
    }

    /// What happened so far.
    #[must_use]
    pub fn counters(&self) -> MdciCounters {
        self.counters
    }

    pub(super) fn cell(&self, id: CellId) -> &Cell {
        self.cells.get(id.0)
    }

    pub(super) fn leaf(&self, id: LeafId) -> &Leaf {
        self.leaves.get(id.0)
    }

    pub(super) fn live_row(&self, token: TokenId) -> Option<Row<'_>> {
        let leaf = self.leaf(self.tokens.get(token.0 as usize)?.leaf?);
        Some(leaf.row(leaf.slot_of(token)?))
    }

    pub(super) fn square_of(&self, token: TokenId) -> f32 {
        self.tokens[token.0 as usize].square
    }
}
