//! A sequence of one layer: one tree per KV head, all of the same length.
#![forbid(unsafe_code)]

use crate::arena::{Lease, PageStore};
use crate::config::{SEGMENT_TOKENS, Sealing};
use crate::error::{Error, Result};
use crate::head::HeadIndex;
use crate::page::Owner;
use crate::snapshot::View;
use crate::sync::{Arc, AtomicUsize, Mutex, MutexGuard, Ordering};
use crate::tail::TailMeans;

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
    /// Tokens in tails now.
    pub tail_tokens: u64,
}

/// State only writers touch.
#[derive(Debug)]
pub(crate) struct Writer {
    pub(crate) owner: Arc<Owner>,
    /// Means of the tail's pages per head, if known.
    pub(crate) means: Vec<Option<TailMeans>>,
    pub(crate) counters: Counters,
    /// Whether a token may be missing, because it was removed here or before a fork.
    pub(crate) removals: bool,
}

/// One sequence of one layer. Writers exclude each other; readers are never delayed.
#[derive(Debug)]
pub struct Forest {
    store: Arc<PageStore>,
    heads: Vec<HeadIndex>,
    sealing: Sealing,
    /// Tokens that all heads have published.
    tokens: AtomicUsize,
    writer: Mutex<Writer>,
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
        let heads = (0..n_heads).map(|_| HeadIndex::new(Arc::clone(&store))).collect();
        Ok(Self::from_parts(store, heads, sealing, 0, false))
    }

    fn from_parts(
        store: Arc<PageStore>,
        heads: Vec<HeadIndex>,
        sealing: Sealing,
        tokens: usize,
        removals: bool,
    ) -> Self {
        let means = heads.iter().map(|_| None).collect();
        let writer = Writer { owner: Arc::default(), means, counters: Counters::default(), removals };
        Self { store, heads, sealing, tokens: AtomicUsize::new(tokens), writer: Mutex::new(writer) }
    }

    /// A sequence of one tree that shares the pages of a view; unlike `fork` it waits for nobody.
    pub(crate) fn of_view(store: Arc<PageStore>, view: &View) -> Self {
        let heads = vec![HeadIndex::of_view(Arc::clone(&store), view)];
        // The view does not know of removals, so tokens may be missing.
        Self::from_parts(store, heads, Sealing::default(), view.tokens(), true)
    }

    /// Store of its pages.
    #[must_use]
    pub fn store(&self) -> &Arc<PageStore> {
        &self.store
    }

    /// Its trees.
    #[must_use]
    pub fn heads(&self) -> &[HeadIndex] {
        &self.heads
    }

    pub(crate) fn sealing(&self) -> Sealing {
        self.sealing
    }

    /// Number of KV heads.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.heads.len()
    }

    /// Tokens, removed ones included.
    #[must_use]
    pub fn len(&self) -> usize {
        // Acquire: pairs with the Release in `grow`; every tree shows at least this many tokens.
        self.tokens.load(Ordering::Acquire)
    }

    /// Whether it has no token.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Pages per head.
    #[must_use]
    pub fn n_pages(&self) -> Vec<usize> {
        self.heads.iter().map(|head| head.view().n_pages()).collect()
    }

    pub(crate) fn grow(&self, n: usize) {
        // Release: pairs with the Acquire in `len`; called by the one writer after all trees were published.
        self.tokens.fetch_add(n, Ordering::Release);
    }

    pub(crate) fn lock_writer(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(|poisoned| {
            // A writer panicked and may have left rows in open pages that it never published. As after a fork, those
            // slots are hidden for good, and a page is copied before anything is appended to it.
            let mut writer = poisoned.into_inner();
            writer.owner = Arc::default();
            writer.means.fill(None);
            self.heads.iter().for_each(|head| head.publish(head.frozen()));
            self.writer.clear_poison();
            writer
        })
    }

    /// A sequence that shares all pages with this one. Tail pages are copied when the fork first appends to them, so
    /// neither sees tokens that the other adds. Blocking: waits for a writer.
    #[must_use]
    pub fn fork(&self) -> Self {
        let writer = self.lock_writer();
        let heads = self.heads.iter().map(HeadIndex::fork).collect();
        Self::from_parts(Arc::clone(&self.store), heads, self.sealing, self.len(), writer.removals)
    }

    /// Keeps the first `n` tokens; afterwards the forest equals one built from them. Blocking: waits for a writer.
    ///
    /// # Errors
    /// If `n` exceeds the length or the store has no room to pack the cut segment again; nothing changes then.
    pub fn crop(&self, n: usize) -> Result<()> {
        let mut writer = self.lock_writer();
        let len = self.len();
        if n > len {
            return Err(Error::OutOfRange { name: "n_tokens", limit: len, received: n });
        }
        if n == len {
            return Ok(());
        }
        let views: Vec<View> = self.heads.iter().map(HeadIndex::view).collect();
        let leases = views
            .iter()
            .map(|view| self.store.lease(HeadIndex::pages_for_crop(view, n)))
            .collect::<Result<Vec<Lease>>>()?;
        for ((head, view), lease) in self.heads.iter().zip(&views).zip(leases) {
            head.publish(HeadIndex::crop(view, n, lease, &writer.owner));
        }
        writer.means.fill(None);
        writer.removals &= n > 0;
        // Release: pairs with the Acquire in `len`.
        self.tokens.store(n, Ordering::Release);
        Ok(())
    }

    /// Marks tokens of all heads dead, in one step per head; searches that start afterwards do not see them. Returns
    /// how many were alive. Their memory is freed when their page is packed again. Blocking: waits for a writer.
    ///
    /// # Errors
    /// If a token is not below the length; nothing changes then.
    pub fn remove(&self, tokens: &[usize]) -> Result<usize> {
        let mut writer = self.lock_writer();
        let len = self.len();
        if let Some(&received) = tokens.iter().find(|&&token| token >= len) {
            return Err(Error::OutOfRange { name: "token", limit: len.saturating_sub(1), received });
        }
        let mut removed = 0;
        for head in &self.heads {
            let (snapshot, n) = HeadIndex::remove(&head.view(), tokens);
            removed = n;
            if n > 0 {
                head.publish(snapshot);
            }
        }
        writer.means.fill(None);
        writer.removals |= removed > 0;
        Ok(removed)
    }

    /// Copies the rows of tokens `start..stop` into `[n_heads, stop - start, dim]` buffers; rows of removed tokens
    /// become zeros. Wait-free.
    ///
    /// # Errors
    /// If the range or a buffer does not fit.
    pub fn read(&self, start: usize, stop: usize, out_keys: &mut [u8], out_values: &mut [u8]) -> Result<()> {
        let len = self.len();
        if stop > len {
            return Err(Error::OutOfRange { name: "stop", limit: len, received: stop });
        }
        if start > stop {
            return Err(Error::OutOfRange { name: "start", limit: stop, received: start });
        }
        let layout = self.store.layout();
        let (n, key, value) = (stop - start, layout.key_bytes(), layout.value_bytes());
        check_length("out_keys", self.n_heads() * n * key, out_keys.len())?;
        check_length("out_values", self.n_heads() * n * value, out_values.len())?;
        out_keys.fill(0);
        out_values.fill(0);
        for (h, head) in self.heads.iter().enumerate() {
            let view = head.view();
            if view.tokens() < stop {
                return Err(Error::OutOfRange { name: "stop", limit: view.tokens(), received: stop });
            }
            for (position, row) in view.rows(start, stop) {
                let i = h * n + position - start;
                out_keys[i * key..][..key].copy_from_slice(row.key);
                out_values[i * value..][..value].copy_from_slice(row.value);
            }
        }
        Ok(())
    }

    /// Bytes of the index beside its pages; segments shared with forks are counted by each.
    #[must_use]
    pub fn index_bytes(&self) -> usize {
        let writer = self.lock_writer();
        let means: usize = writer.means.iter().flatten().map(TailMeans::heap_bytes).sum();
        means + self.heads.iter().map(HeadIndex::heap_bytes).sum::<usize>()
    }

    /// What happened so far and what the forest holds now. Blocking: waits for a writer.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let writer = self.lock_writer();
        let (mut segments, mut tail_tokens) = (0, 0);
        for head in &self.heads {
            let view = head.view();
            segments += view.snapshot().segments.len() as u64;
            tail_tokens += u64::from(view.tail_limit());
        }
        let follows = segments as usize == self.len() / SEGMENT_TOKENS * self.n_heads();
        debug_assert!(follows || self.sealing == Sealing::Never, "segments follow the length");
        Counters { segments, tail_tokens, ..writer.counters }
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
            let _writer = forest.lock_writer();
            let page = &forest.heads()[0].view().snapshot().tail[0].page.clone();
            page.push(5, Row { key: &99.0_f32.to_le_bytes(), value: &[] });
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
