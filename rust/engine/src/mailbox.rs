//! A mailbox: the memory that a device and the workers share, and the steps that go through it.

use std::time::Duration;

use icecache_core::{Forest, PageTable, SearchOptions, View};

use crate::engine::Shared;
use crate::error::{Error, Result};
use crate::memory::{Block, HostMemory};
use crate::shape::{Array, Arrays, MailboxShape};
use crate::step::{Fault, LayerPlan, LayerTime, Step};
use crate::sync::{Arc, Mutex, MutexGuard, Ordering, Word, lock, order};

/// The shared memory. Tickets are atomics; everything else is touched by one side at a time, as the tickets say.
#[derive(Debug)]
pub(crate) struct Memory {
    block: Block,
    shape: MailboxShape,
    arrays: Arrays,
}

impl Memory {
    fn new(block: Block, shape: MailboxShape) -> Self {
        let arrays = shape.arrays();
        assert!(arrays.bytes <= block.bytes(), "the block holds the mailbox");
        Self { block, shape, arrays }
    }

    pub(crate) fn shape(&self) -> &MailboxShape {
        &self.shape
    }

    /// The `index`-th u32 of a layer of an array.
    fn word(&self, array: Array, layer: usize, index: usize) -> &Word {
        assert!(layer < self.shape.layers && 4 * index < array.stride, "word within its layer");
        // SAFETY: by the assertion and the layout it lies in the block.
        let word = unsafe { self.block.start().add(array.at(layer) + 4 * index) };
        // SAFETY: aligned to 4, zero at first, alive as long as `self`, and only ever used as an atomic word.
        unsafe { Word::from_ptr(word.cast().as_ptr()) }
    }

    /// Ticket of the newest request of a layer.
    pub(crate) fn requested(&self, layer: usize) -> u32 {
        // Acquire: pairs with the device's system-scope release of the word, after it wrote the queries.
        self.word(self.arrays.request, layer, 0).load(order::request_seen())
    }

    /// Ticket of the step in which the device gave up waiting for a layer.
    pub(crate) fn timed_out(&self, layer: usize) -> u32 {
        // Acquire: pairs with the device's store; read after the device has finished the step.
        self.word(self.arrays.timeout, layer, 0).load(Ordering::Acquire)
    }

    fn announce(&self, ticket: u32) {
        // Release: pairs with the device's load, if it takes the ticket from here.
        self.word(self.arrays.ticket, 0, 0).store(ticket, Ordering::Release);
    }

    pub(crate) fn publish_unit(&self, layer: usize, unit: usize, ticket: u32) {
        // Release: pairs with the device's acquire; it then sees the unit's table.
        self.word(self.arrays.unit_answered, layer, unit).store(ticket, order::answer());
    }

    pub(crate) fn publish_layer(&self, layer: usize, ticket: u32) {
        // Release: pairs with the device's acquire; it then sees the tables of all units of the layer.
        self.word(self.arrays.answered, layer, 0).store(ticket, order::answer());
    }

    /// Runs `read` on the bytes of a unit's queries.
    pub(crate) fn with_queries(&self, layer: usize, unit: usize, read: impl FnOnce(&[u8])) {
        let bytes = self.shape.unit_query_bytes();
        assert!(layer < self.shape.layers && unit < self.shape.units(), "unit within the mailbox");
        // SAFETY: by the assertion and the layout the unit's queries lie in the block.
        let start = unsafe { self.block.start().add(self.arrays.queries.at(layer) + unit * bytes) };
        // SAFETY: initialised (zero at first); the device wrote them before the ticket that the caller has acquired, and
        // writes again only in a later step.
        read(unsafe { std::slice::from_raw_parts(start.as_ptr(), bytes) });
    }

    /// Replaces the answer of a unit.
    pub(crate) fn write_answer(&self, layer: usize, unit: usize, table: &PageTable) {
        let (shape, arrays) = (&self.shape, &self.arrays);
        let n = table.addresses.len();
        assert!(layer < shape.layers && unit < shape.units(), "unit within the mailbox");
        assert!(n <= shape.capacity && table.lse.len() <= 2 * shape.group, "the answer fits");
        // SAFETY: by the assertions and the layout the unit's words lie in the block.
        let words = unsafe { self.block.start().add(arrays.table.at(layer) + 8 * unit * shape.capacity) }.cast::<u64>();
        for place in 0..shape.capacity {
            let word = table.addresses.get(place).map_or(0, |address| pack(*address, table.live[place]));
            // SAFETY: `place` is below the capacity.
            let slot = unsafe { words.add(place) };
            // SAFETY: aligned to 8; only the worker that claimed the unit writes, and the device reads after the ticket.
            unsafe { slot.write_volatile(word) };
        }
        // SAFETY: as for the words.
        let lse = unsafe { self.block.start().add(arrays.lse.at(layer) + 8 * unit * shape.group) };
        // SAFETY: `2 * group` floats belong to the unit; writers as above; the source is another allocation.
        unsafe { std::ptr::copy_nonoverlapping(table.lse.as_ptr(), lse.cast().as_ptr(), table.lse.len()) };
    }
}

/// A page as one word: its address, and in the upper 16 bits the live slots.
fn pack(address: u64, live: u16) -> u64 {
    debug_assert!(address >> 48 == 0, "user addresses have at most 48 bits");
    address | u64::from(live) << 48
}

/// How the trees of one layer are searched.
pub type LayerOptions = SearchOptions;

#[derive(Debug)]
struct Bound {
    forests: Vec<Arc<Forest>>,
    options: LayerOptions,
}

#[derive(Debug, Default)]
struct State {
    bound: Vec<Option<Bound>>,
    /// What steps search now: fixed views, so that inserts stay invisible and no page is reused until the next refresh.
    plan: Option<Arc<Vec<LayerPlan>>>,
    step: Option<Arc<Step>>,
    ticket: u32,
    times: Vec<LayerTime>,
    fault: Option<(usize, usize, Fault)>,
}

/// A mailbox of an engine. All calls may come from any thread; they exclude each other.
#[derive(Debug)]
pub struct Mailbox {
    engine: Arc<Shared>,
    memory: Arc<Memory>,
    state: Mutex<State>,
}

impl Mailbox {
    pub(crate) fn new(engine: Arc<Shared>, memory: &HostMemory, shape: MailboxShape) -> Result<Self> {
        let shape = shape.check()?;
        let memory = Memory::new(memory.allocate(shape.bytes())?, shape);
        let bound = (0..shape.layers).map(|_| None).collect();
        let state = Mutex::new(State { bound, ..State::default() });
        Ok(Self { engine, memory: Arc::new(memory), state })
    }

    /// Its shape.
    #[must_use]
    pub fn shape(&self) -> &MailboxShape {
        self.memory.shape()
    }

    /// Start and length of its memory, which lives as long as the mailbox.
    #[must_use]
    pub fn raw_memory(&self) -> (std::ptr::NonNull<u8>, usize) {
        (self.memory.block.start(), self.memory.arrays.bytes)
    }

    /// Sets the sequences of a layer, one per row, and how they are searched, from the next step on.
    ///
    /// # Errors
    /// If a step is in flight or the forests do not fit the shape.
    pub fn bind(&self, layer: usize, forests: Vec<Arc<Forest>>, options: LayerOptions) -> Result<()> {
        let shape = *self.shape();
        let mut state = self.idle("bind needs a finished step")?;
        let wrong = |name, expected: String, received: usize| {
            Err(Error::Argument { name, expected, received: received.to_string() })
        };
        if layer >= shape.layers {
            return wrong("layer", format!("less than {}", shape.layers), layer);
        }
        if forests.is_empty() || forests.len() > shape.rows {
            return wrong("forests", format!("1 to {} rows", shape.rows), forests.len());
        }
        for forest in &forests {
            if forest.n_heads() != shape.heads {
                return wrong("forests", format!("{} KV heads", shape.heads), forest.n_heads());
            }
            if forest.store().layout().key_dim != shape.dim {
                return wrong("forests", format!("keys of dim {}", shape.dim), forest.store().layout().key_dim);
            }
        }
        if options.k == 0 || options.k > shape.capacity {
            return wrong("k", format!("1 to the capacity {}", shape.capacity), options.k);
        }
        state.bound[layer] = Some(Bound { forests, options });
        state.plan = None;
        Ok(())
    }

    /// Starts a step and returns its ticket; workers answer from now on. With `refresh`, or after `bind`, steps search
    /// what the forests hold now; otherwise what the step before searched.
    ///
    /// # Errors
    /// If a step is in flight, a layer is not bound, or the engine is gone. Nothing is in flight then.
    pub fn begin(&self, refresh: bool) -> Result<u32> {
        let mut state = self.idle("a step is in flight; end it first")?;
        if refresh || state.plan.is_none() {
            let plan = plan(&state)?;
            state.plan = Some(Arc::new(plan));
        }
        let plan = state.plan.clone().ok_or(Error::State("no layer is bound"))?;
        let ticket = state.ticket.wrapping_add(1).max(1);
        let step = Arc::new(Step::new(Arc::clone(&self.memory), plan, ticket));
        if !self.engine.gate.open(&step) {
            return Err(Error::State(
                "another step of this engine is in flight, a worker is stuck in an earlier one, or the engine is gone",
            ));
        }
        self.memory.announce(ticket);
        state.ticket = ticket;
        state.step = Some(step);
        Ok(ticket)
    }

    /// Ends the step after the device has finished it, and says what went wrong. The mailbox is usable again, unless a
    /// worker is stuck. Without a step in flight it does nothing.
    ///
    /// # Errors
    /// What a worker met, or that the device gave up waiting, or never asked for a layer.
    pub fn end(&self) -> Result<()> {
        let mut state = lock(&self.state);
        let Some(step) = state.step.take() else { return Ok(()) };
        self.close(&step)?;
        state.times = step.times();
        step.outcome()
    }

    /// Ends the step, if there is one, whatever became of it. The device must have finished it.
    ///
    /// # Errors
    /// If a worker is stuck.
    pub fn abort(&self) -> Result<()> {
        let step = lock(&self.state).step.take();
        step.map_or(Ok(()), |step| self.close(&step))
    }

    /// Forgets all sequences and the views of them, so that their pages can be freed.
    ///
    /// # Errors
    /// If a step is in flight.
    pub fn unbind(&self) -> Result<()> {
        let mut state = self.idle("unbind needs a finished step")?;
        state.plan = None;
        state.bound.fill_with(|| None);
        Ok(())
    }

    /// Times of the layers in the last step that `end` ended.
    #[must_use]
    pub fn times(&self) -> Vec<LayerTime> {
        lock(&self.state).times.clone()
    }

    /// Test hook: from the next step on, something goes wrong at this layer and unit.
    #[doc(hidden)]
    pub fn set_fault(&self, fault: Option<(usize, usize, Fault)>) {
        let mut state = lock(&self.state);
        state.fault = fault;
        state.plan = None;
    }

    fn close(&self, step: &Arc<Step>) -> Result<()> {
        let patience: Duration = self.engine.patience;
        if self.engine.gate.close(step, patience) {
            return Ok(());
        }
        Err(Error::Stuck { waited_ms: patience.as_millis() as u64 })
    }

    fn idle(&self, message: &'static str) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        if state.step.is_some() { Err(Error::State(message)) } else { Ok(state) }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // A stuck worker keeps the memory and the views alive by itself.
        let _ = self.abort();
    }
}

fn plan(state: &State) -> Result<Vec<LayerPlan>> {
    let layer = |(layer, bound): (usize, &Option<Bound>)| {
        let bound = bound.as_ref().ok_or(Error::State("begin needs sequences bound to every layer"))?;
        let views: Vec<View> = bound.forests.iter().flat_map(|forest| forest.views()).collect();
        let fault = state.fault.filter(|fault| fault.0 == layer).map(|(_, unit, fault)| (unit, fault));
        Ok(LayerPlan { views, options: bound.options.clone(), fault })
    };
    state.bound.iter().enumerate().map(layer).collect()
}
