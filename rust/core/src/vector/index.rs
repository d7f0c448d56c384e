//! The index itself: configuration, state, and everything that only reads.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use arc_swap::ArcSwap;
use rayon::ThreadPool;

use super::error::{Result, VectorError};
use super::format::{self, Content};
use super::metric::{Metric, check_rows};
use super::search::{Effort, Neighbours, search_batch};
use super::state::State;
use crate::arena::{PageStore, StoreOptions};
use crate::config::SEGMENT_TOKENS;
use crate::forest::Forest;
use crate::layout::{Dtype, PageLayout};
use crate::sync::lock;

/// Memory is reserved this much at a time: many indexes are small.
const SLAB_BYTES: usize = 1 << 20;

/// What an index is made for; fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorConfig {
    /// Length of a vector, 1..=65536.
    pub dim: usize,
    /// How closeness is measured.
    pub metric: Metric,
    /// How rows are stored.
    pub dtype: Dtype,
    /// Subtract the mean of the first 1024 or more vectors from all.
    pub center: bool,
    /// Which rows stand for a set when a bulk addition is ordered.
    pub seed: u64,
}

impl VectorConfig {
    /// # Errors
    /// If `dim` is out of range.
    pub(super) fn check(&self) -> Result<()> {
        match PageLayout::new(self.dtype, self.dim, 0) {
            Ok(_) => Ok(()),
            Err(_) => Err(VectorError::argument("dim", "1..=65536", &self.dim)),
        }
    }

    pub(super) fn new_forest(&self) -> Result<Forest> {
        let options = StoreOptions { slab_bytes: SLAB_BYTES, ..StoreOptions::default() };
        let store = PageStore::new(PageLayout::new(self.dtype, self.dim, 0)?, options);
        Ok(Forest::new(store?, 1)?)
    }
}

/// What to do with an id that is already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnConflict {
    /// Refuse the whole call.
    Error,
    /// The later vector wins.
    Replace,
    /// The earlier vector stays.
    Skip,
}

impl OnConflict {
    /// The rule of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "error" => Ok(Self::Error),
            "replace" => Ok(Self::Replace),
            "skip" => Ok(Self::Skip),
            _ => Err(VectorError::argument("on_conflict", "'error', 'replace' or 'skip'", &format!("'{name}'"))),
        }
    }
}

/// Numbers about an index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct VectorStats {
    /// Vectors in the index.
    pub vectors: usize,
    /// Removed vectors whose rows were not reclaimed yet.
    pub removed: usize,
    /// Sealed segments.
    pub segments: usize,
    /// Pages with a live row.
    pub pages: usize,
    /// Rows of the tail, which every search scores.
    pub tail: usize,
    /// Bytes of pages.
    pub page_bytes: usize,
    /// Bytes of summaries, ids and maps.
    pub index_bytes: usize,
    /// Times that the rows of removed vectors were reclaimed.
    pub compactions: usize,
}

/// What only the holder of the writer lock may touch.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) forest: Forest,
    /// Position of every live id.
    pub(super) positions: HashMap<i64, u32>,
    /// First id that was never used; 2^63 when there is none left.
    pub(super) next_id: u64,
    /// Whether the mean was taken out of the rows.
    pub(super) centred: bool,
    pub(super) compactions: usize,
}

/// A dynamic index of vectors with ids; see the module for how it works and [`VectorIndex::search`] for what it
/// promises.
#[derive(Debug)]
pub struct VectorIndex {
    pub(super) config: VectorConfig,
    pub(super) writer: Mutex<Writer>,
    pub(super) state: ArcSwap<State>,
}

impl VectorIndex {
    /// An empty index.
    ///
    /// # Errors
    /// If `dim` is out of range.
    pub fn new(config: VectorConfig) -> Result<Self> {
        config.check()?;
        let forest = config.new_forest()?;
        let state = State {
            mean: vec![0.0; config.dim].into(),
            layout: forest.store().layout(),
            view: forest.heads()[0].view(),
            blocks: Vec::new(),
            n_live: 0,
        };
        let writer = Writer { forest, positions: HashMap::new(), next_id: 0, centred: false, compactions: 0 };
        Ok(Self { config, writer: Mutex::new(writer), state: ArcSwap::from_pointee(state) })
    }

    /// What it was made for.
    #[must_use]
    pub fn config(&self) -> VectorConfig {
        self.config
    }

    /// Vectors in the index. Wait-free.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.load().n_live
    }

    /// Whether there is no vector. Wait-free.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `k` nearest vectors of each query `[n_queries, dim]`, on `pool` or, without one, on the calling thread.
    ///
    /// One snapshot is searched: the state after some completed write. Wait-free but for a rare slow path of
    /// `arc-swap`; a stalled writer delays nobody. `beam` is the number of sealed pages scored row by row per query;
    /// without one the search stops when what it has not seen is expected to hold less than 1 in 40 of the result.
    /// `exact` scores all.
    ///
    /// # Errors
    /// If the length is no multiple of `dim`, a query is not finite, or the result would not fit memory.
    pub fn search(
        &self,
        pool: Option<&ThreadPool>,
        queries: &[f32],
        k: usize,
        beam: Option<usize>,
        exact: bool,
    ) -> Result<Neighbours> {
        let n_queries = self.check_matrix("queries", queries)?;
        check_rows("queries", queries, self.config.dim)?;
        if k > 0 && beam == Some(0) {
            return Err(VectorError::argument("beam", "at least 1 page", &0));
        }
        let state = self.state.load_full();
        let effort = Effort { beam, exact };
        let empty = Neighbours::reserve(n_queries, k)?;
        let run = |parallel| search_batch(&state, self.config.metric, queries, k, effort, parallel, empty);
        match pool {
            Some(pool) if n_queries > 1 => Ok(pool.install(|| run(true))),
            _ => Ok(run(false)),
        }
    }

    /// Vectors by id, `[n, dim]`, to within the rounding of the stored type. Blocking: waits for a writer.
    ///
    /// # Errors
    /// If an id is not in the index.
    pub fn get(&self, ids: &[i64]) -> Result<Vec<f32>> {
        let (state, positions) = {
            let writer = lock(&self.writer);
            let find = |id: &i64| writer.positions.get(id).map(|&at| at as usize).ok_or(VectorError::Missing(*id));
            (self.state.load_full(), ids.iter().map(find).collect::<Result<Vec<usize>>>()?)
        };
        let broken = || crate::Error::Invariant("an id names a removed row".to_owned());
        let mut rows = state.stored_rows(&positions).ok_or_else(broken)?;
        for (row, &position) in rows.chunks_exact_mut(self.config.dim).zip(&positions) {
            let (block, at) = state.place(position);
            let norm = if self.config.metric == Metric::Cosine { block.extra[at] } else { 1.0 };
            Metric::decode(row, &state.mean, norm);
        }
        Ok(rows)
    }

    /// Whether each id is in the index. Blocking: waits for a writer.
    #[must_use]
    pub fn contains(&self, ids: &[i64]) -> Vec<bool> {
        let writer = lock(&self.writer);
        ids.iter().map(|id| writer.positions.contains_key(id)).collect()
    }

    /// Numbers about the index. Blocking: waits for a writer.
    #[must_use]
    pub fn stats(&self) -> VectorStats {
        let writer = lock(&self.writer);
        let state = self.state.load();
        let map_bytes = writer.positions.capacity() * (size_of::<(i64, u32)>() + 1);
        VectorStats {
            vectors: state.n_live,
            removed: state.n_rows() - state.n_live,
            segments: state.n_segments(),
            pages: state.view.n_pages(),
            tail: state.n_rows() - state.n_segments() * SEGMENT_TOKENS,
            page_bytes: writer.forest.store().used_bytes(),
            index_bytes: writer.forest.index_bytes() + state.block_bytes() + map_bytes + 4 * self.config.dim,
            compactions: writer.compactions,
        }
    }

    /// An index with the same content; neither sees later changes of the other. Blocking: waits for a writer.
    #[must_use]
    pub fn copy(&self) -> Self {
        let writer = lock(&self.writer);
        let forest = writer.forest.fork();
        let state = State { view: forest.heads()[0].view(), ..State::clone(&self.state.load()) };
        let twin = Writer { forest, positions: writer.positions.clone(), ..*writer };
        Self { config: self.config, writer: Mutex::new(twin), state: ArcSwap::from_pointee(state) }
    }

    /// The index as a file. Blocking while it takes its snapshot: waits for a writer.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let (state, next_id, centred) = {
            let writer = lock(&self.writer);
            (self.state.load_full(), writer.next_id, writer.centred)
        };
        let rows = state.view.rows(0, state.n_rows());
        let places = rows.iter().map(|(position, _)| state.place(*position));
        let cosine = self.config.metric == Metric::Cosine;
        format::to_bytes(&Content {
            config: self.config,
            centred,
            next_id,
            mean: state.mean.to_vec(),
            ids: places.clone().map(|(block, at)| block.ids[at]).collect(),
            norms: if cosine { places.map(|(block, at)| block.extra[at]).collect() } else { Vec::new() },
            keys: rows.iter().flat_map(|(_, row)| row.key.iter().copied()).collect(),
        })
    }

    /// Checks every invariant of the structure. Blocking: waits for a writer.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn validate(&self) -> Result<()> {
        let writer = lock(&self.writer);
        let state = self.state.load_full();
        writer.forest.validate()?;
        let broken = |what: &str| Err(crate::Error::Invariant(what.to_owned()).into());
        if writer.positions.len() != state.n_live {
            return broken("one live row per id");
        }
        if state.n_rows() != writer.forest.len() {
            return broken("the published state shows every row");
        }
        let live: Vec<usize> = state.view.rows(0, state.n_rows()).iter().map(|(position, _)| *position).collect();
        if live.len() != state.n_live {
            return broken("the count of live rows is the number of live rows");
        }
        for position in live {
            let (block, at) = state.place(position);
            if writer.positions.get(&block.ids[at]) != Some(&(position as u32)) {
                return broken("the id of a live row names that row");
            }
        }
        let sizes: usize = state.blocks.iter().map(|block| block.ids.len()).sum();
        if sizes != state.n_rows() {
            return broken("every row has an id");
        }
        Ok(())
    }

    pub(super) fn check_matrix(&self, argument: &'static str, rows: &[f32]) -> Result<usize> {
        let dim = self.config.dim;
        if rows.len().is_multiple_of(dim) {
            return Ok(rows.len() / dim);
        }
        Err(VectorError::argument(argument, format!("rows of {dim}"), &format!("{} numbers", rows.len())))
    }

    pub(super) fn publish(&self, state: State) {
        self.state.store(Arc::new(state));
    }
}
