//! Reading by id, and numbers: everything that looks at one published state.
#![forbid(unsafe_code)]

use std::sync::Arc;

use rayon::ThreadPool;

use super::error::{Result, VectorError};
use super::index::VectorIndex;
use super::metric::{Metric, check_rows};
use super::search::{Effort, Neighbours, search_batch};
use super::state::{Place, State};
use crate::config::SEGMENT_TOKENS;

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

impl VectorIndex {
    /// The `k` nearest vectors of each query `[n_queries, dim]`, on `pool` or, without one, on the calling thread.
    ///
    /// One snapshot is searched: the state after some completed write. Wait-free but for a rare slow path of
    /// `arc-swap`; a stalled writer delays nobody. By default the search stops when what it has not seen is expected
    /// to hold less than 1 in 40 of the result. The first search for a recall measures what that takes, see
    /// [`calibrate`](Self::calibrate).
    ///
    /// # Errors
    /// If the length is no multiple of `dim`, a query is not finite, `beam` is 0 or given with a recall, a recall is not in (0, 1], or the result would not fit memory.
    pub fn search(
        &self,
        pool: Option<&ThreadPool>,
        queries: &[f32],
        k: usize,
        effort: Effort<'_>,
    ) -> Result<Neighbours> {
        let n_queries = self.check_queries(queries)?;
        effort.check()?;
        let state = self.state();
        let empty = Neighbours::reserve(n_queries, k)?;
        let effort = if n_queries == 0 { effort } else { effort.resolved(&state, self.config.metric, k, pool) };
        let run = |parallel| search_batch(&state, self.config.metric, queries, k, effort, parallel, empty);
        match pool {
            Some(pool) if n_queries > 1 => Ok(pool.install(|| run(true))),
            _ => Ok(run(false)),
        }
    }

    /// Vectors by id, `[n, dim]`, to within the rounding of the stored type. Wait-free.
    ///
    /// # Errors
    /// If an id is not in the index or `out` has another length.
    pub fn get(&self, ids: &[i64], out: &mut [f32]) -> Result<()> {
        let dim = self.config.dim;
        if out.len() != ids.len() * dim {
            let expected = format!("{} numbers", ids.len() * dim);
            return Err(VectorError::argument("out", expected, &out.len()));
        }
        let state = self.state();
        let find = |&id: &i64| state.find(id).ok_or(VectorError::Missing(id));
        let places = ids.iter().map(find).collect::<Result<Vec<Place>>>()?;
        for (row, &place) in out.chunks_exact_mut(dim).zip(&places) {
            state.read(place, row);
            Metric::decode(row, &state.mean, state.norm(self.config.metric, place.position));
        }
        Ok(())
    }

    /// Whether each id is in the index. Wait-free.
    #[must_use]
    pub fn contains(&self, ids: &[i64]) -> Vec<bool> {
        let state = self.state();
        ids.iter().map(|&id| state.find(id).is_some()).collect()
    }

    /// What is subtracted from every vector before it is stored: zeros until there are enough vectors. Wait-free.
    #[must_use]
    pub fn mean(&self) -> Arc<[f32]> {
        Arc::clone(&self.state().mean)
    }

    /// Numbers about the index. Wait-free.
    #[must_use]
    pub fn stats(&self) -> VectorStats {
        let state = self.state();
        VectorStats {
            vectors: state.n_live,
            removed: state.n_rows() - state.n_live,
            segments: state.n_segments(),
            pages: state.view.n_pages(),
            tail: state.n_rows() - state.n_segments() * SEGMENT_TOKENS,
            page_bytes: state.view.page_bytes(),
            index_bytes: state.view.heap_bytes()
                + state.block_bytes()
                + state.ids.heap_bytes()
                + state.calibration.heap_bytes()
                + state.codes.as_ref().map_or(0, |codes| codes.heap_bytes())
                + 4 * self.config.dim
                + size_of::<State>(),
            compactions: state.compactions,
        }
    }

    /// Checks every invariant of the structure. Blocking: waits for a writer.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn validate(&self) -> Result<()> {
        let broken = |what: &str| Err(crate::Error::Invariant(what.to_owned()).into());
        let state = if self.is_read_only() {
            self.state()
        } else {
            let forest = self.lock_writer()?;
            forest.validate()?;
            let state = self.state();
            if state.n_rows() != forest.len() {
                return broken("the published state shows every row");
            }
            state
        };
        let live: Vec<usize> = state.view.rows(0, state.n_rows()).iter().map(|(position, _)| *position).collect();
        if live.len() != state.n_live {
            return broken("the count of live rows is the number of live rows");
        }
        for position in live {
            if state.find(state.id(position)).map(|place| place.position) != Some(position) {
                return broken("the id of a live row names that row");
            }
        }
        let sizes: usize = state.blocks.iter().map(|block| block.ids.len()).sum();
        if sizes != state.n_rows() {
            return broken("every row has an id");
        }
        Ok(())
    }

    /// Number of queries, if all can be searched for.
    ///
    /// # Errors
    /// If the length is no multiple of `dim` or a query is not finite.
    pub fn check_queries(&self, queries: &[f32]) -> Result<usize> {
        let n_queries = self.check_matrix("queries", queries.len())?;
        check_rows("queries", queries, self.config.dim)?;
        Ok(n_queries)
    }

    pub(super) fn check_matrix(&self, argument: &'static str, n_numbers: usize) -> Result<usize> {
        let dim = self.config.dim;
        if n_numbers.is_multiple_of(dim) {
            return Ok(n_numbers / dim);
        }
        Err(VectorError::argument(argument, format!("rows of {dim}"), &format!("{n_numbers} numbers")))
    }
}
