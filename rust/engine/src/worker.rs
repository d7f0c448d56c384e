//! Worker threads.

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::board::{Board, Sharer};
use crate::cores::pin_current_thread;
use crate::error::{Error, Result};
use crate::gate::Gate;
use crate::step::Buffers;
use crate::sync::Arc;

/// Polls before a polite worker lets other threads run.
const POLLS_BEFORE_YIELD: u32 = 64;
/// How long a worker polls for a request at full speed: longer than any layer takes.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long it sleeps between polls after that: the device is busy with something else, or nobody ended the step.
const NAP: Duration = Duration::from_micros(200);

/// How to wait for something that comes soon.
#[derive(Debug)]
pub(crate) struct Backoff {
    polls: u32,
    polite: bool,
    began: Option<Instant>,
}

impl Backoff {
    /// `polite`: there are not enough cores for workers that never yield.
    pub(crate) fn new(polite: bool) -> Self {
        Self { polls: 0, polite, began: None }
    }

    /// Waits a little.
    pub(crate) fn pause(&mut self) {
        self.polls = self.polls.wrapping_add(1);
        if !self.polls.is_multiple_of(POLLS_BEFORE_YIELD) {
            std::hint::spin_loop();
        } else if self.began.get_or_insert_with(Instant::now).elapsed() > PATIENCE {
            std::thread::sleep(NAP);
        } else if self.polite {
            std::thread::yield_now();
        }
    }
}

/// How workers run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    pub(crate) linger: Duration,
    pub(crate) polite: bool,
}

/// Starts one worker per entry of `cores`; `None` is not bound to a core.
pub(crate) fn start(gate: &Arc<Gate>, cores: &[Option<usize>], manner: Manner) -> Result<Vec<JoinHandle<()>>> {
    let board = Arc::new(Board::new(cores.len()));
    let spawn = |(i, core): (usize, &Option<usize>)| {
        let (gate, board, core) = (Arc::clone(gate), Arc::clone(&board), *core);
        let run = move || {
            if let Some(core) = core {
                pin_current_thread(&[core]);
            }
            work(&gate, Sharer { board: &board, worker: i }, manner);
        };
        let name = format!("icecache-search-{i}");
        std::thread::Builder::new().name(name).spawn(run).map_err(|error| Error::Thread(error.to_string()))
    };
    cores.iter().enumerate().map(spawn).collect()
}

fn work(gate: &Gate, sharer: Sharer<'_>, manner: Manner) {
    let (mut seen, mut buffers) = (0, Buffers::default());
    while let Some(step) = gate.enter(&mut seen, manner.linger, manner.polite) {
        step.serve(&mut buffers, sharer, manner.polite);
        drop(step);
        gate.leave();
    }
}
