//! Adding, removing and packing again: everything that takes the writers' lock.
//!
//! A write prepares a new state on the forest, which readers do not see, and publishes it last. Whatever goes wrong
//! before, the forest is taken back to the published state, so nothing has changed.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use rayon::ThreadPool;

use super::batch::{Batch, Piece, to_stored};
use super::codes;
use super::error::{Result, VectorError};
use super::ids::IdTable;
use super::index::{OnConflict, VectorConfig, VectorIndex};
use super::input::{Numbers, Rows};
use super::metric::{Metric, dot};
use super::order::{REGION, region_order};
use super::progress::{Progress, Report};
use super::regroup::{regroup, regrouping_is_due};
use super::state::{Block, State};
use crate::config::SEGMENT_TOKENS;
use crate::extend::{ExtendRow, extend};
use crate::forest::Forest;

/// Removed rows below which nothing is reclaimed: less than a segment is not worth a rebuild.
const MIN_DEAD: usize = SEGMENT_TOKENS;
/// Segments packed between two reports: tens of milliseconds, and enough work for any number of threads.
const CHUNK_SEGMENTS: usize = 32;

/// A call of `add`.
#[derive(Debug, Clone, Copy)]
pub struct Addition<'a> {
    /// `[n, dim]`.
    pub vectors: Numbers<'a>,
    /// One per vector; default: the next free ids.
    pub ids: Option<&'a [i64]>,
    /// What to do with an id that is already there.
    pub on_conflict: OnConflict,
}

impl VectorIndex {
    /// Adds vectors; all of them or, on an error or when `report` says so, none. Returns the id of every row.
    /// Blocking: waits for other writers; readers go on.
    ///
    /// # Errors
    /// If a size does not fit, a vector cannot be stored, an id is taken ([`OnConflict::Error`]) or out of range,
    /// memory is out, the index is read-only, or `report` asks to stop.
    pub fn add(&self, pool: &ThreadPool, addition: Addition<'_>, report: Option<Report<'_>>) -> Result<Vec<i64>> {
        let config = self.config;
        let n = self.check_matrix("vectors", addition.vectors.len())?;
        let vectors = Rows { numbers: addition.vectors, dim: config.dim };
        vectors.check("vectors")?;
        if let Some(ids) = addition.ids {
            check_ids(ids, n)?;
        }
        let mut forest = self.lock_writer()?;
        let state = self.state();
        let ids = match addition.ids {
            Some(ids) => ids.to_vec(),
            None => next_ids(state.next_id, n)?,
        };
        // Ids that ascend from a new one on cannot be taken, which is what most calls bring.
        let fresh = ids.first().is_none_or(|&first| first as u64 >= state.next_id) && ids.is_sorted_by(|a, b| a < b);
        let (chosen, replaced) =
            if fresh { ((0..n).collect(), Vec::new()) } else { resolve(&state, &ids, addition.on_conflict)? };
        let mut batch = Batch::encode(config, &state.mean, &ids, vectors, &chosen);
        batch.check_storable(config, &chosen)?;
        let mut progress = Progress::new(report, chosen.len());
        let mut draft = State::clone(&state);
        if let Some(&largest) = ids.iter().max() {
            draft.next_id = draft.next_id.max(largest as u64 + 1);
        }
        let n_after = state.n_live - replaced.len() + chosen.len();
        if config.center && !state.centred && n_after >= REGION {
            let mut all = Batch::live(config, &state, 0, &replaced);
            all.append(batch);
            draft.mean = all.take_mean(config).into();
            draft.centred = true;
            batch = all;
            self.rebuild(pool, &mut forest, draft, &batch, &mut progress)?;
        } else {
            self.grow(pool, &mut forest, draft, &batch, &replaced, &mut progress)?;
        }
        self.reclaim(pool, &mut forest);
        Ok(ids)
    }

    /// Removes vectors; returns how many there were. Blocking: waits for other writers; readers go on.
    ///
    /// # Errors
    /// If `strict` is set and an id is not in the index, or the index is read-only; nothing is removed then.
    pub fn remove(&self, pool: &ThreadPool, ids: &[i64], strict: bool) -> Result<usize> {
        let mut forest = self.lock_writer()?;
        let state = self.state();
        let mut positions = Vec::with_capacity(ids.len());
        for &id in ids {
            match state.find(id) {
                Some(place) => positions.push(place.position),
                None if strict => return Err(VectorError::Missing(id)),
                None => {}
            }
        }
        positions.sort_unstable();
        positions.dedup();
        if positions.is_empty() {
            return Ok(0);
        }
        forest.remove(&positions)?;
        let n_live = state.n_live - positions.len();
        self.publish(State { view: forest.heads()[0].view(), n_live, ..State::clone(&state) });
        self.reclaim(pool, &mut forest);
        Ok(positions.len())
    }

    /// Packs all vectors again, as one bulk addition would: the rows of removed vectors go, and pages that grew by
    /// single insertions become as good as built ones. Blocking: waits for other writers; readers go on.
    ///
    /// # Errors
    /// If memory is out, the index is read-only, or `report` asks to stop; nothing has changed then.
    pub fn compact(&self, pool: &ThreadPool, report: Option<Report<'_>>) -> Result<()> {
        let mut forest = self.lock_writer()?;
        let state = self.state();
        self.repack(pool, &mut forest, &state, &mut Progress::new(report, state.n_live))
    }

    /// Appends a batch to the tree and publishes.
    fn grow(
        &self,
        pool: &ThreadPool,
        forest: &mut Forest,
        mut draft: State,
        batch: &Batch,
        replaced: &[usize],
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let done = if regrouping_is_due(&draft, batch.len()) {
            regroup(self.config, pool, forest, &mut draft, batch, replaced, progress)
        } else {
            append(self.config, pool, forest, &mut draft, batch, replaced, progress)
        };
        match done {
            Ok(()) => self.publish(draft),
            Err(_) => *forest = self.state().fork(),
        }
        done
    }

    /// Replaces tree and state by new ones that hold `batch` only; the rows lack the draft's mean.
    fn rebuild(
        &self,
        pool: &ThreadPool,
        forest: &mut Forest,
        draft: State,
        batch: &Batch,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let fresh = self.config.new_forest()?;
        let State { mean, centred, next_id, compactions, .. } = draft;
        let calibration = Arc::new(draft.calibration.renewed());
        let empty = State::empty(self.config, &fresh);
        let mut state = State { mean, centred, next_id, calibration, compactions, ..empty };
        append(self.config, pool, &fresh, &mut state, batch, &[], progress)?;
        *forest = fresh;
        self.publish(state);
        Ok(())
    }

    /// Packs the live rows again.
    fn repack(&self, pool: &ThreadPool, forest: &mut Forest, state: &State, progress: &mut Progress<'_>) -> Result<()> {
        let mut draft = state.clone();
        draft.compactions += 1;
        if state.n_live == 0 {
            (draft.mean, draft.centred) = (vec![0.0; self.config.dim].into(), false);
        }
        self.rebuild(pool, forest, draft, &Batch::live(self.config, state, 0, &[]), progress)
    }

    /// Packs the live rows again when a third of all rows is dead.
    fn reclaim(&self, pool: &ThreadPool, forest: &mut Forest) {
        let state = self.state();
        let dead = state.n_rows() - state.n_live;
        if dead < MIN_DEAD || dead * 3 < state.n_rows() {
            return;
        }
        // Without memory for it the removed rows stay where they are; the write itself is done.
        let _ = self.repack(pool, forest, &state, &mut Progress::new(None, 0));
    }
}

/// Appends a batch to forest and state, the part beyond the next segment boundary in the order of `region_order`.
pub(super) fn append(
    config: VectorConfig,
    pool: &ThreadPool,
    forest: &Forest,
    state: &mut State,
    batch: &Batch,
    replaced: &[usize],
    progress: &mut Progress<'_>,
) -> Result<()> {
    let (n, first) = (batch.len(), forest.len());
    let fill = (SEGMENT_TOKENS - first % SEGMENT_TOKENS) % SEGMENT_TOKENS;
    let order: Vec<usize> = if n < fill + 2 * REGION {
        (0..n).collect()
    } else {
        let order = pool.install(|| region_order(&batch.rows[fill * config.dim..], config.dim, config.seed));
        (0..fill).chain(order.iter().map(|&row| fill + row as usize)).collect()
    };
    append_ordered(config, pool, forest, state, batch, &order, progress)?;
    if n >= fill + 2 * REGION {
        state.runs.note(first, forest.len());
    }
    if !replaced.is_empty() {
        forest.remove(replaced)?;
        state.view = forest.heads()[0].view();
        state.n_live -= replaced.len();
    }
    state.enter_ids(first);
    Ok(())
}

/// Appends the rows of a batch in some order to forest, blocks and view.
pub(super) fn append_ordered(
    config: VectorConfig,
    pool: &ThreadPool,
    forest: &Forest,
    state: &mut State,
    batch: &Batch,
    order: &[usize],
    progress: &mut Progress<'_>,
) -> Result<()> {
    let first = forest.len();
    if first + order.len() >= u32::MAX as usize {
        return Err(VectorError::argument("vectors", "fewer than 2^32 - 1 rows", &(first + order.len())));
    }
    let before = Arc::clone(&state.view.snapshot().segments);
    let mut done = 0;
    while done < order.len() {
        // Pieces end where segments end, so that the tree is the same for any cut.
        let room = CHUNK_SEGMENTS * SEGMENT_TOKENS - forest.len() % SEGMENT_TOKENS;
        let size = room.min(order.len() - done);
        let some = &order[done..done + size];
        let piece = if size == batch.len() && some.is_sorted() { batch.all() } else { batch.pick(some, config.dim) };
        let keys = to_stored(config, &piece.rows);
        extend(pool, &[ExtendRow { forest, keys: &keys, values: &[] }])?;
        extend_blocks(config, &mut state.blocks, &piece, &keys);
        done += size;
        progress.step(done)?;
    }
    state.view = forest.heads()[0].view();
    if config.codes && !Arc::ptr_eq(&before, &state.view.snapshot().segments) {
        state.codes = pool.install(|| codes::renew(state.codes.as_ref(), &state.view, config.metric, &state.mean));
    }
    state.n_live += order.len();
    Ok(())
}

fn extend_blocks(config: VectorConfig, blocks: &mut Vec<Arc<Block>>, piece: &Piece<'_>, keys: &[u8]) {
    let mut row = vec![0.0; config.dim];
    let mut stored = keys.chunks_exact(config.dtype.row_bytes(config.dim));
    let mut done = 0;
    while done < piece.ids.len() {
        if blocks.last().is_none_or(|block| block.ids.len() == SEGMENT_TOKENS) {
            blocks.push(Arc::default());
        }
        // Readers of older states keep their own copy of the last block.
        let Some(block) = blocks.last_mut().map(Arc::make_mut) else { return };
        let end = piece.ids.len().min(done + SEGMENT_TOKENS - block.ids.len());
        block.ids.extend(&piece.ids[done..end]);
        match config.metric {
            Metric::InnerProduct => {}
            Metric::Cosine => block.extra.extend_from_slice(&piece.norms[done..end]),
            Metric::SquaredL2 => block.extra.extend(stored.by_ref().take(end - done).map(|key| {
                crate::rows::decode(config.dtype, key, &mut row);
                (0.5 * dot(&row, &row)) as f32
            })),
        }
        done = end;
    }
}

impl State {
    /// Enters the ids of the rows from `first` on, into a new table of all live rows if the old one has no room. What the
    /// old one took until then does no harm: it names the same rows.
    pub(super) fn enter_ids(&mut self, first: usize) {
        let known = (first..self.n_rows()).all(|position| self.ids.insert(self.id(position), position as u32));
        if known {
            return;
        }
        let mut live: Vec<(i64, u32)> = Vec::with_capacity(self.n_live);
        for page in self.view.pages() {
            live.extend(page.slots().map(|slot| page.position(slot)).map(|at| (self.id(at), at as u32)));
        }
        let least = live.iter().map(|(id, _)| *id).min().unwrap_or(0);
        let end = live.iter().map(|(id, _)| *id).max().map_or(least, |most| most.saturating_add(1));
        let mut room = live.len();
        loop {
            let table = IdTable::with_room(room, least..end);
            if live.iter().all(|&(id, position)| table.insert(id, position)) {
                self.ids = Arc::new(table);
                return;
            }
            // Ids that crowd in one place of a hash table: next to never.
            room *= 2;
        }
    }
}

fn check_ids(ids: &[i64], n: usize) -> Result<()> {
    if ids.len() != n {
        return Err(VectorError::argument("ids", format!("{n}, one per vector"), &ids.len()));
    }
    match ids.iter().position(|&id| id < 0) {
        None => Ok(()),
        Some(row) => Err(VectorError::argument("ids", "ids in [0, 2^63)", &format!("{} at row {row}", ids[row]))),
    }
}

fn next_ids(next_id: u64, n: usize) -> Result<Vec<i64>> {
    let end = next_id.saturating_add(n as u64);
    if end > 1 << 63 {
        return Err(VectorError::argument("ids", "given ids, because the largest id is used", &"none"));
    }
    Ok((next_id..end).map(|id| id as i64).collect())
}

/// Rows of the call to store, and positions of the rows they replace.
fn resolve(state: &State, ids: &[i64], on_conflict: OnConflict) -> Result<(Vec<usize>, Vec<usize>)> {
    let mut latest: HashMap<i64, usize> = HashMap::with_capacity(ids.len());
    let mut replaced = Vec::new();
    for (row, &id) in ids.iter().enumerate() {
        let stored = state.find(id);
        if stored.is_none() && !latest.contains_key(&id) {
            latest.insert(id, row);
            continue;
        }
        match on_conflict {
            OnConflict::Error => return Err(VectorError::Duplicate { id, row }),
            OnConflict::Skip => {}
            OnConflict::Replace => {
                if latest.insert(id, row).is_none() {
                    replaced.extend(stored.map(|place| place.position));
                }
            }
        }
    }
    // The row that holds each id: of equal ids the first with `skip`, the last with `replace`.
    let chosen = (0..ids.len()).filter(|row| latest.get(&ids[*row]) == Some(row)).collect();
    Ok((chosen, replaced))
}
