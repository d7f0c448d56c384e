//! A sequence of one layer: one tree per KV head, all of the same length.
#![forbid(unsafe_code)]

use crate::arena::{Lease, PageStore};
use crate::columns::Columns;
use crate::config::{PART_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::cut;
use crate::error::{Error, Result};
use crate::groups::Segments;
use crate::head::HeadIndex;
use crate::page::Row;
use crate::pending::{BLOCK_TOKENS, Pending};
use crate::rows::is_finite;
use crate::shared::Shared;
use crate::snapshot::View;
use crate::state::{SegmentEntry, State, Tail, Tree, Trees};
use crate::sync::Arc;

/// What happened to a forest so far, summed over its heads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Tokens inserted one by one into a tail.
    pub inserts: u64,
    /// Pages split.
    pub splits: u64,
    /// Segments packed.
    pub seals: u64,
    /// Segments now.
    pub segments: u64,
    /// Tokens in tails now, or on their way into one.
    pub tail_tokens: u64,
}

/// One sequence of one layer. Any number of threads may read and write it at the same time; nobody waits for anybody.
#[derive(Debug)]
pub struct Forest {
    shared: Arc<Shared>,
    heads: Vec<HeadIndex>,
}

impl Forest {
    /// An empty sequence.
    ///
    /// # Errors
    /// If `n_heads` is 0 or above 65536.
    pub fn new(store: Arc<PageStore>, n_heads: usize) -> Result<Self> {
        Self::with_sealing(store, n_heads, Sealing::default())
    }

    /// An empty sequence that seals its tails in another way.
    ///
    /// # Errors
    /// As for [`Forest::new`].
    pub fn with_sealing(store: Arc<PageStore>, n_heads: usize, sealing: Sealing) -> Result<Self> {
        if n_heads == 0 || n_heads > 1 << 16 {
            let received = n_heads.to_string();
            return Err(Error::Option { name: "n_kv_heads", expected: "1..=65536", received });
        }
        Ok(Self::from_state(store, sealing, State::empty(n_heads)))
    }

    fn from_state(store: Arc<PageStore>, sealing: Sealing, state: State) -> Self {
        Self::of_shared(Shared::new(store, sealing, state, true))
    }

    fn of_shared(shared: Shared) -> Self {
        let (n_heads, shared) = (shared.load().trees.heads.len(), Arc::new(shared));
        let heads = (0..n_heads).map(|head| HeadIndex::new(&shared, head)).collect();
        Self { shared, heads }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// A sequence that shares the pages that the forest of a view had at that moment. Wait-free.
    pub(crate) fn of_view(store: Arc<PageStore>, sealing: Sealing, view: &View) -> Self {
        Self::from_state(store, sealing, view.frozen())
    }

    /// A sequence that goes on from these trees in place of another one.
    pub(crate) fn of_trees(store: Arc<PageStore>, sealing: Sealing, trees: Arc<Trees>) -> Self {
        Self::of_shared(Shared::new(store, sealing, State { trees, pending: Vec::new() }, false))
    }

    /// A sequence of one tree with these segments of 1024 positions each and an empty tail.
    pub(crate) fn of_segments(store: Arc<PageStore>, entries: Vec<SegmentEntry>) -> Self {
        let tokens = entries.len() * SEGMENT_TOKENS;
        let segments = Arc::new(Segments::default().extended(entries));
        let tree = Tree { segments, frozen: None, tail: Tail::new(tokens, Vec::new(), None) };
        let trees = Arc::new(Trees { heads: Box::new([tree]), tokens, removals: true });
        Self::from_state(store, Sealing::default(), State { trees, pending: Vec::new() })
    }

    /// Store of its pages.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.shared.store
    }

    /// Its trees.
    #[must_use]
    pub fn heads(&self) -> &[HeadIndex] {
        &self.heads
    }

    /// What a reader sees of all heads now: the same tokens of each.
    #[must_use]
    pub fn views(&self) -> impl ExactSizeIterator<Item = View> + use<> {
        self.shared.views()
    }

    /// Number of KV heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.heads.len()
    }

    /// Tokens, removed ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shared.tokens()
    }

    /// Whether it has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pages per head.
    #[must_use]
    pub fn n_pages(&self) -> Vec<usize> {
        self.views().map(|view| view.n_pages()).collect()
    }

    /// Adds one token: a key and a value of every head, `[n_heads, key_dim]` and `[n_heads, value_dim]` as bytes.
    /// Returns its position. Every search that starts after this returned finds it. Lock-free, from any thread.
    ///
    /// The trees depend on the order of the positions only, once [`Forest::settle`] was called.
    ///
    /// # Errors
    /// If a length does not fit, a key is not finite, or the store is full; nothing changes then.
    pub fn insert(&self, keys: &[u8], values: &[u8]) -> Result<usize> {
        let layout = self.store().layout();
        check_length("keys", self.n_heads() * layout.key_bytes(), keys.len())?;
        check_length("values", self.n_heads() * layout.value_bytes(), values.len())?;
        let rows: Vec<Row<'_>> = (0..self.n_heads()).map(|head| Row::of_slot(layout, keys, values, head)).collect();
        if let Some(head) = rows.iter().position(|row| !is_finite(layout.dtype, row.key, row.key.len())) {
            return Err(Error::NotFinite { argument: "keys", row: 0, head, vector: 0 });
        }
        loop {
            let state = self.shared.load();
            if let Some(last) = state.pending.last()
                && let (Pending::Open(block), None) = (&*last.block, last.limit)
                && let Some(place) = block.push(self.store(), &rows)?
            {
                if place + 1 == BLOCK_TOKENS || state.pending.len() > 1 {
                    self.shared.drain(None);
                }
                return Ok(last.base + place);
            }
            self.shared.open_block(state.pending.last());
        }
    }

    /// Routes all tokens into the trees that were inserted before this call. Lock-free; searches see no difference.
    ///
    /// # Errors
    /// If the store has no room; the tokens that are left keep being found.
    pub fn settle(&self) -> Result<()> {
        self.shared.settled(None).map(|_| ())
    }

    /// A sequence that shares all pages with this one. Open pages are copied by whichever of the two is second to append
    /// to them, so neither sees tokens that the other adds. Wait-free.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self::of_view(Arc::clone(self.store()), self.shared.sealing, &self.shared.view(0))
    }

    /// Keeps the first `n` tokens; afterwards the forest equals one built from them. Lock-free.
    ///
    /// # Errors
    /// If `n` exceeds the length or the store has no room to pack the cut segment again; nothing changes then.
    pub fn crop(&self, n: usize) -> Result<()> {
        let _writing = self.shared.begin();
        loop {
            let state = self.shared.settled(None)?;
            let len = state.trees.tokens;
            if n > len {
                return Err(Error::OutOfRange { name: "n_tokens", limit: len, received: n });
            }
            if n == len {
                return Ok(());
            }
            let views = || (0..self.n_heads()).map(|head| View::new(Arc::clone(&state), head, len));
            let views: Vec<View> = views().collect();
            let plans: Vec<_> = views.iter().map(|view| cut::plan_crop(view, n, self.shared.sealing)).collect();
            let leases = plans.iter().map(|plan| self.store().lease(plan.n_pages())).collect::<Result<Vec<Lease>>>()?;
            let pieces = views.iter().zip(plans).zip(leases);
            let heads = pieces.map(|((view, plan), lease)| cut::crop(view, n, plan, lease)).collect::<Result<_>>()?;
            let trees = Trees { heads, tokens: n, removals: state.trees.removals && n > 0 };
            if self.shared.replace_trees(&state.trees, &Arc::new(trees)) {
                return Ok(());
            }
        }
    }

    /// Marks tokens of all heads dead, in one step; searches that start afterwards do not see them. Returns how many
    /// were alive. Their memory is freed when their page is packed again. Lock-free.
    ///
    /// # Errors
    /// If a token is not below the length, or was inserted just now and the store has no room to route it; nothing
    /// changes then.
    pub fn remove(&self, tokens: &[usize]) -> Result<usize> {
        let mut sorted = tokens.to_vec();
        sorted.sort_unstable();
        let _writing = self.shared.begin();
        loop {
            let mut state = self.shared.load();
            let len = state.tokens();
            if let Some(&received) = tokens.iter().find(|&&token| token >= len) {
                return Err(Error::OutOfRange { name: "token", limit: len.saturating_sub(1), received });
            }
            if sorted.last().is_some_and(|&token| token >= state.trees.tokens) {
                state = self.shared.settled(None)?;
            }
            let mut removed = 0;
            let cut = |tree: &Tree| {
                let (tree, n) = cut::remove(tree, &sorted);
                removed = n;
                tree
            };
            let heads = state.trees.heads.iter().map(cut).collect();
            if removed == 0 {
                return Ok(0);
            }
            let trees = Arc::new(Trees { heads, tokens: state.trees.tokens, removals: true });
            let published = self.shared.update(|current| {
                let unchanged = Arc::ptr_eq(&current.trees, &state.trees);
                unchanged.then(|| State { trees: Arc::clone(&trees), pending: current.pending.clone() })
            });
            if published {
                return Ok(removed);
            }
        }
    }

    /// Copies the rows of tokens `start..stop` into `[n_heads, stop - start, dim]` buffers; rows of removed tokens
    /// become zeros. Wait-free.
    ///
    /// # Errors
    /// If the range or a buffer does not fit.
    pub fn read(&self, start: usize, stop: usize, out_keys: &mut [u8], out_values: &mut [u8]) -> Result<()> {
        let layout = self.store().layout();
        self.read_columns(start, stop, (Columns::key(layout), out_keys), (Columns::value(layout), out_values))
    }

    /// The same for other columns of the rows than the whole key and the whole value. Wait-free.
    ///
    /// # Errors
    /// If the range or a buffer does not fit, or columns lie neither in the key nor in the value.
    pub fn read_columns(
        &self,
        start: usize,
        stop: usize,
        (keys, out_keys): (Columns, &mut [u8]),
        (values, out_values): (Columns, &mut [u8]),
    ) -> Result<()> {
        let views: Vec<View> = self.views().collect();
        let len = views.first().map_or(0, View::tokens);
        if stop > len {
            return Err(Error::OutOfRange { name: "stop", limit: len, received: stop });
        }
        if start > stop {
            return Err(Error::OutOfRange { name: "start", limit: stop, received: start });
        }
        let (layout, n) = (self.store().layout(), stop - start);
        let (keys, values) = (keys.checked("key_at", layout)?, values.checked("value_at", layout)?);
        check_length("out_keys", self.n_heads() * n * keys.len, out_keys.len())?;
        check_length("out_values", self.n_heads() * n * values.len, out_values.len())?;
        out_keys.fill(0);
        out_values.fill(0);
        for (h, view) in views.iter().enumerate() {
            for (position, row) in view.rows(start, stop) {
                let i = h * n + position - start;
                out_keys[i * keys.len..][..keys.len].copy_from_slice(keys.of(&row));
                out_values[i * values.len..][..values.len].copy_from_slice(values.of(&row));
            }
        }
        Ok(())
    }

    /// Bytes of the index beside its pages; segments shared with forks are counted by each. Wait-free.
    #[must_use]
    pub fn index_bytes(&self) -> usize {
        size_of::<Shared>() + self.views().map(|view| view.heap_bytes()).sum::<usize>()
    }

    /// What happened so far and what the forest holds now. Wait-free.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let counts = self.shared.counts();
        let state = self.shared.load();
        let tokens = state.tokens();
        let segments = |tree: &Tree| tree.segments.len() as u64;
        let sealed = |tree: &Tree| tree.tail_start() + tree.segments.parts().len() * PART_TOKENS;
        let tail_tokens = |tree: &Tree| (tokens - sealed(tree)) as u64;
        Counters {
            inserts: counts.inserts,
            splits: counts.splits,
            seals: counts.seals,
            segments: state.trees.heads.iter().map(segments).sum(),
            tail_tokens: state.trees.heads.iter().map(tail_tokens).sum(),
        }
    }
}

pub(crate) fn check_length(argument: &'static str, expected: usize, received: usize) -> Result<()> {
    if expected == received { Ok(()) } else { Err(Error::Length { argument, expected, received }) }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use rayon::ThreadPoolBuilder;

    use crate::page::Row;
    use crate::{Dtype, ExtendRow, Forest, PageLayout, PageStore, StoreOptions, extend};

    #[test]
    fn rows_that_a_panicking_writer_left_behind_never_appear() {
        let layout = PageLayout::new(Dtype::F32, 1, 0).unwrap();
        let forest = Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap();
        let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let add = |keys: std::ops::Range<u16>| {
            let keys: Vec<u8> = keys.flat_map(|key| f32::from(key).to_le_bytes()).collect();
            extend(&pool, &[ExtendRow { forest: &forest, keys: &keys, values: &[] }]).unwrap();
        };
        add(0..5);
        let interrupted = catch_unwind(AssertUnwindSafe(|| {
            let _writing = forest.shared().begin();
            let entry = &forest.heads()[0].view().snapshot().tail.entries[0].clone();
            entry.page.append(entry.count as usize, 5, Row { key: &99.0_f32.to_le_bytes(), value: &[] });
            panic!("half-way");
        }));
        assert!(interrupted.is_err());
        add(5..9);
        forest.validate().unwrap();
        let mut keys = [0; 9 * 4];
        forest.read(0, 9, &mut keys, &mut []).unwrap();
        assert_eq!(bytemuck::cast_slice::<u8, f32>(&keys), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
    }
}
