//! Searching for a recall: how many pages that takes is measured on the index itself.
//!
//! A sample of queries, given ones or stored rows, is searched exactly and then with more and more pages; the curve that
//! comes out (`curve`) turns a recall into a number of pages. Curves are measured when a search first asks for a recall,
//! one per class of `k`, kept beside the states they stand for, and measured again after a quarter of the vectors came
//! or went. Rows that stand for queries do not find themselves.
//!
//! Whoever searches keeps what it measured by one atomic swap: nobody waits, two threads may measure the same. The first
//! curve that stands for a state is used, so a later one does not change what an older snapshot answers.
#![forbid(unsafe_code)]

use std::sync::Arc;

use arc_swap::ArcSwap;
use rayon::ThreadPool;

use super::curve::{Basis, Curve, RecallPoint};
use super::error::{Result, VectorError};
use super::index::VectorIndex;
use super::metric::Metric;
use super::search::{Effort, Neighbours, search_batch};
use super::state::State;
use crate::config::{PAGE_TOKENS, SEGMENT_PAGES};

/// Queries of a sample: recall is known to within .01 or so.
pub(super) const SAMPLE: usize = 256;
/// Fewest queries of a sample.
const SMALL_SAMPLE: usize = 64;
/// Multiplications of the exact searches of a sample, about: two seconds of one thread.
const EXACT_WORK: usize = 1 << 33;
/// Recall at which a curve ends; whoever asks for more gets all vectors looked at.
const ENOUGH: f32 = 0.9995;
/// Neighbours from which all vectors are looked at.
const MOST_NEIGHBOURS: usize = 10_000;
/// Curves kept: two of every class of `k`.
pub(super) const MOST_CURVES: usize = 26;

/// Queries that stand for those to come, and what was measured with them.
#[derive(Debug, Default)]
pub(super) struct Calibration {
    /// `[n, dim]` as given; empty where stored rows stand for queries.
    pub(super) queries: Arc<[f32]>,
    curves: ArcSwap<Vec<Arc<Curve>>>,
}

impl Calibration {
    /// A calibration with at most [`SAMPLE`] of the queries, at equal distances.
    pub(super) fn of_queries(queries: &[f32], dim: usize) -> Self {
        let n = queries.len() / dim;
        let chosen = (0..n.min(SAMPLE)).map(|at| at * n / n.min(SAMPLE));
        let queries = chosen.flat_map(|at| &queries[at * dim..][..dim]).copied().collect();
        Self { queries, ..Self::default() }
    }

    pub(super) fn of_parts(queries: Vec<f32>, curves: Vec<Curve>) -> Self {
        let curves = curves.into_iter().map(Arc::new).collect();
        Self { queries: queries.into(), curves: ArcSwap::from_pointee(curves) }
    }

    /// The same queries, for rows that were packed again.
    pub(super) fn renewed(&self) -> Self {
        Self { queries: Arc::clone(&self.queries), ..Self::default() }
    }

    /// The same, for an index that goes its own way from here.
    pub(super) fn duplicate(&self) -> Self {
        Self { queries: Arc::clone(&self.queries), curves: ArcSwap::new(self.curves.load_full()) }
    }

    pub(super) fn curves(&self) -> Arc<Vec<Arc<Curve>>> {
        self.curves.load_full()
    }

    pub(super) fn heap_bytes(&self) -> usize {
        let curve = |curve: &Arc<Curve>| size_of::<Curve>() + size_of_val(&*curve.points);
        size_of::<Self>() + 4 * self.queries.len() + self.curves().iter().map(curve).sum::<usize>()
    }

    /// The curve for the `k` nearest of a state that has sealed pages and more than `k` vectors.
    fn curve(&self, state: &Arc<State>, metric: Metric, k: usize, pool: Option<&ThreadPool>) -> Arc<Curve> {
        let basis = Basis::of(state);
        if let Some(curve) = self.curves.load().iter().find(|curve| curve.holds(k, basis)) {
            return Arc::clone(curve);
        }
        let points = Sample::of(state, metric, &self.queries).measure(state, metric, k, pool);
        let measured = Arc::new(Curve { k, basis, points });
        self.curves.rcu(|curves| {
            let mut curves = Vec::clone(curves);
            curves.push(Arc::clone(&measured));
            let surplus = curves.len().saturating_sub(MOST_CURVES);
            curves.drain(..surplus);
            curves
        });
        measured
    }
}

impl VectorIndex {
    /// Takes a sample of `queries` `[n, dim]` for [`Effort::recall`] in place of the ones before; an empty one: stored
    /// rows stand for queries. Blocking: waits for other writers; readers go on.
    ///
    /// # Errors
    /// If the length is no multiple of `dim`, a query is not finite, or the index is read-only.
    pub fn set_sample(&self, queries: &[f32]) -> Result<()> {
        self.check_queries(queries)?;
        let _forest = self.lock_writer()?;
        let calibration = Arc::new(Calibration::of_queries(queries, self.config.dim));
        self.publish(State { calibration, ..State::clone(&self.state()) });
        Ok(())
    }

    /// How recall of the `k` nearest grows with the pages visited, ascending; measured, on `pool` or the calling thread,
    /// unless it is known. Empty where every search looks at all vectors. Waits for nobody.
    ///
    /// # Errors
    /// If `k` is not in 1..=10000.
    pub fn calibrate(&self, pool: Option<&ThreadPool>, k: usize) -> Result<Vec<RecallPoint>> {
        if !(1..=MOST_NEIGHBOURS).contains(&k) {
            return Err(VectorError::argument("k", format!("1..={MOST_NEIGHBOURS}"), &k));
        }
        let state = self.state();
        let Some(k) = class_of(k, &state) else { return Ok(Vec::new()) };
        Ok(state.calibration.curve(&state, self.config.metric, k, pool).points.clone())
    }
}

impl Effort<'_> {
    /// The effort that its recall asks for.
    pub(super) fn resolved(self, state: &Arc<State>, metric: Metric, k: usize, pool: Option<&ThreadPool>) -> Self {
        let Some(recall) = self.recall.filter(|_| !self.exact && k > 0) else { return self };
        let all = Self { exact: true, recall: None, ..self };
        // The k nearest of the allowed vectors are about as far away as the nearest k n / n_allowed of all.
        let n_allowed = self.filter.map_or(state.n_live, |filter| filter.compile(state).n_live).max(1);
        let k = (k as u128 * state.n_live as u128).div_ceil(n_allowed as u128);
        let class = usize::try_from(k).ok().and_then(|k| class_of(k, state)).filter(|_| recall < 1.0);
        let Some(class) = class else { return all };
        match state.calibration.curve(state, metric, class, pool).beam(recall) {
            Some(beam) => Self { beam: Some(beam), recall: None, ..self },
            None => all,
        }
    }
}

/// The next of 1, 2, 5, 10, 20, 50, ..; `None` where all vectors are to be looked at.
fn class_of(k: usize, state: &State) -> Option<usize> {
    let classes = (0..5).flat_map(|power| [1, 2, 5].map(|digit| digit * 10_usize.pow(power)));
    let class = classes.take_while(|&class| class <= MOST_NEIGHBOURS).find(|&class| class >= k)?;
    (state.n_segments() > 0 && class < state.n_live).then_some(class)
}

/// Queries `[n, dim]` and, where they are stored rows, their ids.
struct Sample {
    queries: Vec<f32>,
    own: Vec<i64>,
}

impl Sample {
    fn of(state: &State, metric: Metric, given: &[f32]) -> Self {
        let dim = state.dim();
        let most = (EXACT_WORK / (state.n_rows() * dim).max(1)).clamp(SMALL_SAMPLE, SAMPLE);
        if !given.is_empty() {
            return Self { queries: given[..given.len().min(most * dim)].to_vec(), own: Vec::new() };
        }
        let (mut queries, mut own) = (Vec::with_capacity(most * dim), Vec::with_capacity(most));
        for at in 0..most {
            let stretch = at * state.n_rows() / most..(at + 1) * state.n_rows() / most;
            let Some(place) = stretch.into_iter().find_map(|position| state.place(position)) else { continue };
            let start = queries.len();
            queries.resize(start + dim, 0.0);
            state.read(place, &mut queries[start..]);
            Metric::decode(&mut queries[start..], &state.mean, state.norm(metric, place.position));
            own.push(state.id(place.position));
        }
        Self { queries, own }
    }

    fn measure(&self, state: &Arc<State>, metric: Metric, k: usize, pool: Option<&ThreadPool>) -> Vec<RecallPoint> {
        let n_queries = self.queries.len() / state.dim();
        let wanted = k + usize::from(!self.own.is_empty());
        let search = |effort| {
            let empty = Neighbours::reserve(n_queries, wanted).unwrap_or_default();
            let run = |parallel| search_batch(state, metric, &self.queries, wanted, effort, parallel, empty);
            match pool {
                Some(pool) => pool.install(|| run(true)),
                None => run(false),
            }
        };
        let bars = self.bars(&search(Effort::EXACT), k, wanted);
        let n_pages = state.n_segments() * SEGMENT_PAGES;
        let mut points = Vec::new();
        let mut beam = (k / PAGE_TOKENS / 2).max(1).next_power_of_two();
        while beam < n_pages {
            let found = search(Effort { beam: Some(beam), ..Effort::default() });
            let (recall, error) = self.recall(&found, &bars, k, wanted);
            points.push(RecallPoint { beam, recall, error });
            if recall >= ENOUGH {
                break;
            }
            // 1, 2, 3, 4, 6, 8, 12, ..
            beam += if beam.is_power_of_two() { beam.div_ceil(2) } else { beam / 3 };
        }
        points
    }

    /// Whether a result is not the query itself.
    fn is_other(&self, query: usize, id: i64) -> bool {
        id >= 0 && self.own.get(query) != Some(&id)
    }

    /// Distance of the k-th nearest vector to each query.
    fn bars(&self, truth: &Neighbours, k: usize, wanted: usize) -> Vec<f32> {
        let rows = truth.ids.chunks_exact(wanted).zip(truth.distances.chunks_exact(wanted)).enumerate();
        let kth = |(query, (ids, distances)): (usize, (&[i64], &[f32]))| {
            let others = ids.iter().zip(distances).filter(|(id, _)| self.is_other(query, **id));
            others.map(|(_, distance)| *distance).take(k).last().unwrap_or(f32::INFINITY)
        };
        rows.map(kth).collect()
    }

    /// Mean recall and its standard error. Vectors as far away as the k-th nearest count as found.
    fn recall(&self, found: &Neighbours, bars: &[f32], k: usize, wanted: usize) -> (f32, f32) {
        let rows = found.ids.chunks_exact(wanted).zip(found.distances.chunks_exact(wanted)).zip(bars).enumerate();
        let shares: Vec<f64> = rows
            .map(|(query, ((ids, distances), bar))| {
                let near =
                    ids.iter().zip(distances).filter(|(id, distance)| self.is_other(query, **id) && *distance <= bar);
                near.count().min(k) as f64 / k as f64
            })
            .collect();
        let n = shares.len().max(1) as f64;
        let mean = shares.iter().sum::<f64>() / n;
        let variance = shares.iter().map(|share| (share - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
        (mean as f32, (variance / n).sqrt() as f32)
    }
}
