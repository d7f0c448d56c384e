//! One step in flight: which unit is answered by whom, and what came of it.
//!
//! Workers go through the layers in order. A layer's units, its (row, head) pairs, are claimed one by one with
//! `fetch_add`, so that a worker the system takes off its core delays one unit only. A new `Step` is made for each step:
//! a worker that is late holds the old one and cannot claim anything of the new.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use half::{bf16, f16};
use icecache_core::{Dtype, PageTable, SearchOptions, Share, View, search_view};

use crate::board::Sharer;
use crate::claims::Claims;
use crate::error::{Error, Result};
use crate::mailbox::Memory;
use crate::sync::{Arc, AtomicBool, AtomicU64, Mutex, Ordering, lock};
use crate::worker::Backoff;

/// What the trees of one layer are searched for.
#[derive(Debug)]
pub(crate) struct LayerPlan {
    /// `[rows, heads]`, rows of this batch only.
    pub(crate) views: Vec<View>,
    pub(crate) options: SearchOptions,
    /// Test hook: a unit, and what goes wrong there.
    pub(crate) fault: Option<(usize, Fault)>,
}

/// What a test lets go wrong in a worker.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The worker panics.
    Panic,
    /// The worker is busy for so long.
    Stall(Duration),
}

/// When a layer was asked for and answered, in nanoseconds since the step began; 0: not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerTime {
    /// The request was seen.
    pub seen_ns: u64,
    /// The last unit was answered.
    pub answered_ns: u64,
    /// Longest search of one unit.
    pub longest_unit_ns: u64,
}

/// Own cache lines: all workers write here while they work on the layer.
#[derive(Debug, Default)]
#[repr(align(128))]
struct LayerState {
    claims: Claims,
    seen_ns: AtomicU64,
    answered_ns: AtomicU64,
    longest_unit_ns: AtomicU64,
}

/// A step.
#[derive(Debug)]
pub(crate) struct Step {
    memory: Arc<Memory>,
    plan: Arc<Vec<LayerPlan>>,
    ticket: u32,
    began: Instant,
    layers: Vec<LayerState>,
    over: AtomicBool,
    failure: Mutex<Option<Error>>,
}

/// Buffers of a worker.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    queries: Vec<f32>,
    table: PageTable,
}

impl Step {
    pub(crate) fn new(memory: Arc<Memory>, plan: Arc<Vec<LayerPlan>>, ticket: u32) -> Self {
        let layers = plan.iter().map(|_| LayerState::default()).collect();
        let (over, failure) = (AtomicBool::new(false), Mutex::new(None));
        Self { memory, plan, ticket, began: Instant::now(), layers, over, failure }
    }

    /// Workers leave as soon as they have finished the unit at hand.
    pub(crate) fn stop(&self) {
        // Release: pairs with the Acquire in `is_over`; nothing is published by it, the pair only orders the flag after
        // what the stopping thread did before.
        self.over.store(true, Ordering::Release);
    }

    fn is_over(&self) -> bool {
        // Acquire: pairs with the Release in `stop`.
        self.over.load(Ordering::Acquire)
    }

    /// Answers layer after layer until the last one, or until the step is over; helps others in between.
    pub(crate) fn serve(&self, buffers: &mut Buffers, sharer: Sharer<'_>, polite: bool) {
        for layer in 0..self.layers.len() {
            let mut backoff = Backoff::new(polite);
            while self.memory.requested(layer) != self.ticket {
                if self.is_over() {
                    return;
                }
                if sharer.board.help(sharer.worker) {
                    backoff = Backoff::new(polite);
                }
                backoff.pause();
            }
            self.serve_layer(layer, buffers, sharer);
        }
    }

    fn serve_layer(&self, layer: usize, buffers: &mut Buffers, sharer: Sharer<'_>) {
        let state = &self.layers[layer];
        let units = self.plan[layer].views.len();
        while let Some(unit) = state.claims.claim(units) {
            let started = self.elapsed_ns();
            if unit == 0 {
                // Relaxed: a figure, read when the workers have left (the gate's lock orders that).
                state.seen_ns.store(started, Ordering::Relaxed);
            }
            self.answer_guarded(layer, unit, buffers, sharer);
            // Relaxed: as above.
            state.longest_unit_ns.fetch_max(self.elapsed_ns() - started, Ordering::Relaxed);
            self.memory.publish_unit(layer, unit, self.ticket);
            if state.claims.finish(units) {
                // Relaxed: as above.
                state.answered_ns.store(self.elapsed_ns(), Ordering::Relaxed);
                self.memory.publish_layer(layer, self.ticket);
            }
        }
    }

    /// Answers one unit. When that fails, the unit keeps its earlier pages and the step fails.
    fn answer_guarded(&self, layer: usize, unit: usize, buffers: &mut Buffers, sharer: Sharer<'_>) {
        let result = catch_unwind(AssertUnwindSafe(|| self.answer(layer, unit, buffers, sharer)));
        let heads = self.memory.shape().heads;
        let (row, head) = (unit / heads, unit % heads);
        let error = match result {
            Ok(Ok(())) => return,
            Ok(Err(icecache_core::Error::NotFinite { .. })) => Error::Query { layer, row, head },
            Ok(Err(error)) => Error::Core(error),
            Err(panic) => {
                // Half-written buffers are not used again.
                *buffers = Buffers::default();
                Error::Panic { layer, row, head, message: panic_message(&*panic) }
            }
        };
        lock(&self.failure).get_or_insert(error);
    }

    fn answer(
        &self,
        layer: usize,
        unit: usize,
        buffers: &mut Buffers,
        sharer: Sharer<'_>,
    ) -> icecache_core::Result<()> {
        let plan = &self.plan[layer];
        match plan.fault.filter(|(place, _)| *place == unit) {
            None => {}
            Some((_, Fault::Panic)) => panic!("asked to by a test"),
            Some((_, Fault::Stall(time))) => std::thread::sleep(time),
        }
        let shape = self.memory.shape();
        self.memory.with_queries(layer, unit, |bytes| to_f32(shape.dtype, bytes, &mut buffers.queries));
        let share: Option<&dyn Share> = if sharer.is_alone() { None } else { Some(&sharer) };
        let Buffers { queries, table } = buffers;
        search_view(&plan.views[unit], queries, &plan.options, shape.capacity, share, table)?;
        self.memory.write_answer(layer, unit, &buffers.table);
        Ok(())
    }

    fn elapsed_ns(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    /// Times of all layers, once the workers have left.
    pub(crate) fn times(&self) -> Vec<LayerTime> {
        // Relaxed: the workers left through the gate's lock.
        let time = |state: &LayerState| LayerTime {
            seen_ns: state.seen_ns.load(Ordering::Relaxed),
            answered_ns: state.answered_ns.load(Ordering::Relaxed),
            longest_unit_ns: state.longest_unit_ns.load(Ordering::Relaxed),
        };
        self.layers.iter().map(time).collect()
    }

    /// What came of the step, once the workers have left.
    pub(crate) fn outcome(&self) -> Result<()> {
        if let Some(error) = lock(&self.failure).take() {
            return Err(error);
        }
        if let Some(layer) = (0..self.layers.len()).find(|&layer| self.memory.timed_out(layer) == self.ticket) {
            return Err(Error::Overrun { layer });
        }
        let complete = |layer: usize| {
            self.layers[layer].claims.finished() == self.plan[layer].views.len()
                && self.memory.requested(layer) == self.ticket
        };
        let layers = self.layers.len();
        match (0..layers).find(|&layer| !complete(layer)) {
            None => Ok(()),
            Some(layer) if self.memory.requested(layer) == self.ticket => Err(Error::Overrun { layer }),
            Some(layer) => Err(Error::NoRequest { layer, answered: layer, layers }),
        }
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned()
}

fn to_f32(dtype: Dtype, bytes: &[u8], out: &mut Vec<f32>) {
    out.clear();
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        Dtype::F32 => out.extend(bytes.as_chunks::<4>().0.iter().map(|&x| f32::from_le_bytes(x))),
        Dtype::F16 => out.extend(pairs().map(|&x| f16::from_le_bytes(x).to_f32())),
        Dtype::Bf16 => out.extend(pairs().map(|&x| bf16::from_le_bytes(x).to_f32())),
        // Queries never come in it: no engine is made for such pages.
        Dtype::I8 => out.extend(bytes.iter().map(|&x| f32::from(x.cast_signed()))),
    }
}
