//! Adding, removing, reclaiming and loading: everything that takes the writer lock to change something.
//!
//! A write prepares all that can fail first, then extends or replaces the tree, and ends with one swap of the state.
#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::ThreadPool;

use super::error::{Result, VectorError};
use super::format;
use super::index::{OnConflict, VectorConfig, VectorIndex, Writer};
use super::metric::{Metric, check_rows, check_stored_rows, dot};
use super::order::{REGION, region_order};
use super::state::{Block, State};
use crate::config::SEGMENT_TOKENS;
use crate::extend::{ExtendRow, extend};
use crate::forest::Forest;
use crate::layout::Dtype;
use crate::rows::is_finite;
use crate::sync::lock;

/// Removed rows below which nothing is reclaimed: less than a segment is not worth a rebuild.
const MIN_DEAD: usize = SEGMENT_TOKENS;

/// Rows in their stored form before rounding, with what is kept beside them.
#[derive(Default)]
struct Batch {
    ids: Vec<i64>,
    /// `[n, dim]`.
    rows: Vec<f32>,
    /// Norms as given, cosine only.
    norms: Vec<f32>,
}

impl VectorIndex {
    /// Adds vectors `[n, dim]` under `ids`, or under the next free ids; all of them or, on an error, none.
    /// Returns the id of every row. Blocking: waits for other writers; searches go on.
    ///
    /// # Errors
    /// If a size does not fit, a vector cannot be stored, an id is taken ([`OnConflict::Error`]) or out of range, or
    /// memory is out.
    pub fn add(
        &self,
        pool: &ThreadPool,
        ids: Option<&[i64]>,
        vectors: &[f32],
        on_conflict: OnConflict,
    ) -> Result<Vec<i64>> {
        let n = self.check_matrix("vectors", vectors)?;
        check_rows("vectors", vectors, self.config.dim)?;
        if let Some(ids) = ids {
            check_ids(ids, n)?;
        }
        let mut writer = lock(&self.writer);
        let ids = match ids {
            Some(ids) => ids.to_vec(),
            None => next_ids(writer.next_id, n)?,
        };
        let (chosen, replaced) = resolve(&writer.positions, &ids, on_conflict)?;
        let state = self.state.load_full();
        let n_after = state.n_live - replaced.len() + chosen.len();
        let batch = self.encode(&state.mean, &ids, vectors, &chosen);
        check_storable(self.config.dtype, &batch.rows, self.config.dim, &chosen)?;
        if self.config.center && !writer.centred && n_after >= REGION {
            let mut all = self.live_batch(&state, &replaced);
            all.append(batch);
            let (mean, all) = take_mean(self.config, all);
            self.rebuild(pool, &mut writer, &mean, &all)?;
        } else if !chosen.is_empty() {
            self.append(pool, &mut writer, &state, &batch, &replaced)?;
        }
        if let Some(&largest) = ids.iter().max() {
            writer.next_id = writer.next_id.max(largest as u64 + 1);
        }
        self.reclaim(pool, &mut writer);
        Ok(ids)
    }

    /// Removes vectors; returns how many there were. Blocking: waits for other writers; searches go on.
    ///
    /// # Errors
    /// If `strict` is set and an id is not in the index; nothing is removed then.
    pub fn remove(&self, pool: &ThreadPool, ids: &[i64], strict: bool) -> Result<usize> {
        let mut writer = lock(&self.writer);
        if strict && let Some(&missing) = ids.iter().find(|id| !writer.positions.contains_key(id)) {
            return Err(VectorError::Missing(missing));
        }
        let mut positions: Vec<usize> =
            ids.iter().filter_map(|id| writer.positions.get(id)).map(|&at| at as usize).collect();
        positions.sort_unstable();
        positions.dedup();
        if positions.is_empty() {
            return Ok(0);
        }
        writer.forest.remove(&positions)?;
        for id in ids {
            writer.positions.remove(id);
        }
        let state = self.state.load_full();
        let n_live = state.n_live - positions.len();
        self.publish(State { view: writer.forest.heads()[0].view(), n_live, ..State::clone(&state) });
        self.reclaim(pool, &mut writer);
        Ok(positions.len())
    }

    /// The index of a file; its pages are packed again, in the order of the file.
    ///
    /// # Errors
    /// If the bytes are not a complete, unchanged file of this version.
    pub fn from_bytes(pool: &ThreadPool, file: &[u8]) -> Result<Self> {
        let content = format::from_bytes(file)?;
        let config = content.config;
        let mut rows = vec![0.0; content.ids.len() * config.dim];
        crate::rows::decode(config.dtype, &content.keys, &mut rows);
        for values in [&rows, &content.mean] {
            check_stored_rows("file", values, config.dim).map_err(|error| VectorError::format(error.to_string()))?;
        }
        let index = Self::new(config)?;
        {
            let mut writer = lock(&index.writer);
            let state = State { mean: content.mean.into(), ..State::clone(&index.state.load_full()) };
            let batch = Batch { ids: content.ids, rows, norms: content.norms };
            index.append_in_order(pool, &mut writer, &state, &batch, &[])?;
            (writer.next_id, writer.centred) = (content.next_id, content.centred);
        }
        Ok(index)
    }

    fn encode(&self, mean: &[f32], ids: &[i64], vectors: &[f32], chosen: &[usize]) -> Batch {
        let VectorConfig { dim, metric, .. } = self.config;
        let mut batch = Batch { rows: vec![0.0; chosen.len() * dim], ..Batch::default() };
        for (&row, out) in chosen.iter().zip(batch.rows.chunks_exact_mut(dim)) {
            let vector = &vectors[row * dim..][..dim];
            metric.encode(vector, mean, out);
            batch.ids.push(ids[row]);
            if metric == Metric::Cosine {
                batch.norms.push(metric.stored_norm(vector));
            }
        }
        batch
    }

    /// All live rows but those at `except`, in the order of their positions.
    fn live_batch(&self, state: &State, except: &[usize]) -> Batch {
        let dim = self.config.dim;
        let mut batch = Batch::default();
        let mut skipped = except.to_vec();
        skipped.sort_unstable();
        for (position, row) in state.view.rows(0, state.n_rows()) {
            if skipped.binary_search(&position).is_ok() {
                continue;
            }
            let (block, at) = state.place(position);
            batch.ids.push(block.ids[at]);
            if self.config.metric == Metric::Cosine {
                batch.norms.push(block.extra[at]);
            }
            let end = batch.rows.len();
            batch.rows.resize(end + dim, 0.0);
            crate::rows::decode(self.config.dtype, row.key, &mut batch.rows[end..]);
        }
        batch
    }

    /// Appends a batch to the tree, the part beyond the next segment boundary in the order of `region_order`.
    fn append(
        &self,
        pool: &ThreadPool,
        writer: &mut Writer,
        state: &State,
        batch: &Batch,
        replaced: &[usize],
    ) -> Result<()> {
        let n = batch.ids.len();
        let fill = (SEGMENT_TOKENS - state.n_rows() % SEGMENT_TOKENS) % SEGMENT_TOKENS;
        if n < fill + 2 * REGION {
            return self.append_in_order(pool, writer, state, batch, replaced);
        }
        let (dim, seed) = (self.config.dim, self.config.seed);
        let rest = &batch.rows[fill * dim..];
        let order = pool.install(|| region_order(rest, dim, seed));
        let order: Vec<usize> = (0..fill).chain(order.iter().map(|&row| fill + row as usize)).collect();
        self.append_in_order(pool, writer, state, &batch.permuted(&order, dim), replaced)
    }

    fn append_in_order(
        &self,
        pool: &ThreadPool,
        writer: &mut Writer,
        state: &State,
        batch: &Batch,
        replaced: &[usize],
    ) -> Result<()> {
        let keys = to_stored(self.config.dtype, &batch.rows);
        let first = state.n_rows();
        if u32::try_from(first + batch.ids.len()).is_err() {
            return Err(VectorError::argument("vectors", "fewer than 2^32 rows", &(first + batch.ids.len())));
        }
        extend(pool, &[ExtendRow { forest: &writer.forest, keys: &keys, values: &[] }])?;
        // From here on nothing fails: every position below the length exists.
        if !replaced.is_empty() {
            writer.forest.remove(replaced)?;
        }
        for (offset, &id) in batch.ids.iter().enumerate() {
            writer.positions.insert(id, (first + offset) as u32);
        }
        let mut blocks = state.blocks.clone();
        self.extend_blocks(&mut blocks, batch, &keys);
        self.publish(State {
            view: writer.forest.heads()[0].view(),
            blocks,
            n_live: state.n_live + batch.ids.len() - replaced.len(),
            ..state.clone()
        });
        Ok(())
    }

    fn extend_blocks(&self, blocks: &mut Vec<Arc<Block>>, batch: &Batch, keys: &[u8]) {
        let dim = self.config.dim;
        let mut row = vec![0.0; dim];
        for (at, &id) in batch.ids.iter().enumerate() {
            if blocks.last().is_none_or(|block| block.ids.len() == SEGMENT_TOKENS) {
                blocks.push(Arc::default());
            }
            // Readers of older states keep their own copy of the last block.
            let Some(block) = blocks.last_mut().map(Arc::make_mut) else { continue };
            block.ids.push(id);
            match self.config.metric {
                Metric::InnerProduct => {}
                Metric::Cosine => block.extra.push(batch.norms[at]),
                Metric::SquaredL2 => {
                    let bytes = dim * self.config.dtype.size();
                    crate::rows::decode(self.config.dtype, &keys[at * bytes..][..bytes], &mut row);
                    block.extra.push((0.5 * dot(&row, &row)) as f32);
                }
            }
        }
    }

    /// Replaces tree and state by new ones that hold `batch` only; `mean` is what its rows lack.
    fn rebuild(&self, pool: &ThreadPool, writer: &mut Writer, mean: &[f32], batch: &Batch) -> Result<()> {
        let forest: Forest = self.config.new_forest()?;
        let state = State {
            mean: mean.into(),
            layout: forest.store().layout(),
            view: forest.heads()[0].view(),
            blocks: Vec::new(),
            n_live: 0,
        };
        let mut fresh = Writer { forest, positions: HashMap::new(), centred: true, ..*writer };
        self.append(pool, &mut fresh, &state, batch, &[])?;
        *writer = fresh;
        Ok(())
    }

    /// Packs the live rows again when a third of all rows is dead.
    fn reclaim(&self, pool: &ThreadPool, writer: &mut Writer) {
        let state = self.state.load_full();
        let dead = state.n_rows() - state.n_live;
        if dead < MIN_DEAD || dead * 3 < state.n_rows() {
            return;
        }
        let centred = writer.centred && state.n_live > 0;
        let mean = if centred { state.mean.to_vec() } else { vec![0.0; self.config.dim] };
        // Without memory for it the removed rows stay where they are; the write itself is done.
        if self.rebuild(pool, writer, &mean, &self.live_batch(&state, &[])).is_ok() {
            writer.centred = centred;
            writer.compactions += 1;
        }
    }
}

impl Batch {
    fn append(&mut self, other: Self) {
        self.ids.extend(other.ids);
        self.rows.extend(other.rows);
        self.norms.extend(other.norms);
    }

    fn permuted(&self, order: &[usize], dim: usize) -> Self {
        Self {
            ids: order.iter().map(|&row| self.ids[row]).collect(),
            rows: order.iter().flat_map(|&row| &self.rows[row * dim..][..dim]).copied().collect(),
            norms: if self.norms.is_empty() { Vec::new() } else { order.iter().map(|&row| self.norms[row]).collect() },
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
fn resolve(positions: &HashMap<i64, u32>, ids: &[i64], on_conflict: OnConflict) -> Result<(Vec<usize>, Vec<usize>)> {
    let mut latest: HashMap<i64, usize> = HashMap::with_capacity(ids.len());
    let mut replaced = Vec::new();
    for (row, &id) in ids.iter().enumerate() {
        let stored = positions.get(&id);
        if stored.is_none() && !latest.contains_key(&id) {
            latest.insert(id, row);
            continue;
        }
        match on_conflict {
            OnConflict::Error => return Err(VectorError::Duplicate { id, row }),
            OnConflict::Skip => {}
            OnConflict::Replace => {
                if latest.insert(id, row).is_none() {
                    replaced.extend(stored.map(|&at| at as usize));
                }
            }
        }
    }
    let chosen = (0..ids.len()).filter(|row| latest.get(&ids[*row]) == Some(row)).collect();
    Ok((chosen, replaced))
}

/// Refuse a row that becomes infinite in the stored type, by its number in the call.
fn check_storable(dtype: Dtype, rows: &[f32], dim: usize, chosen: &[usize]) -> Result<()> {
    for (values, &row) in rows.chunks_exact(dim).zip(chosen) {
        if !is_finite(dtype, &to_stored(dtype, values)) {
            return Err(VectorError::Row { argument: "vectors", row, problem: "has a value too large for the dtype" });
        }
    }
    Ok(())
}

/// The mean of all rows, and the rows without it. Where 16 bits do not hold a row without the mean: zero, and the rows.
fn take_mean(config: VectorConfig, batch: Batch) -> (Vec<f32>, Batch) {
    let dim = config.dim;
    let mut sum = vec![0.0f64; dim];
    for row in batch.rows.chunks_exact(dim) {
        for (slot, &value) in sum.iter_mut().zip(row) {
            *slot += f64::from(value);
        }
    }
    let mean: Vec<f32> = sum.iter().map(|value| (value / batch.ids.len().max(1) as f64) as f32).collect();
    let mut rows = batch.rows.clone();
    for row in rows.chunks_exact_mut(dim) {
        for (value, &center) in row.iter_mut().zip(&mean) {
            *value = (f64::from(*value) - f64::from(center)) as f32;
        }
    }
    if is_finite(config.dtype, &to_stored(config.dtype, &rows)) {
        return (mean, Batch { rows, ..batch });
    }
    (vec![0.0; dim], batch)
}

/// Rounds to the stored type, to nearest.
fn to_stored(dtype: Dtype, rows: &[f32]) -> Vec<u8> {
    match dtype {
        Dtype::F32 => rows.iter().flat_map(|value| value.to_le_bytes()).collect(),
        Dtype::F16 => rows.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes()).collect(),
        Dtype::Bf16 => rows.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()).collect(),
    }
}
