//! Work that is begun aside and whose result is needed at a fixed later moment: packing a segment while tokens keep
//! coming.
//!
//! A [`Task`] runs once: on the maintenance thread of its store, or on the thread that needs its result first. Whoever
//! needs it late never waits for an idle thread, only for one that is at it. One thread serves a store, at the
//! priority of whoever began it: all layers seal at the same token, and their packing must not queue up in front of the searches in the
//! caller's pool.
#![forbid(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::{any::Any, fmt, mem, thread};

use crate::sync::{Arc, OnceLock};

enum Phase<T> {
    Waiting(Box<dyn FnOnce() -> T + Send>),
    Running,
    Done(T),
    Panicked(Box<dyn Any + Send>),
    /// The panic was handed to a thread that needed the result.
    Lost,
}

/// A panic of an earlier holder does not matter: it leaves complete phases only.
fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A result that somebody computes.
pub(crate) struct Task<T> {
    phase: Mutex<Phase<T>>,
    ended: Condvar,
}

impl<T> fmt::Debug for Task<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task").finish_non_exhaustive()
    }
}

impl<T: Clone + Send + 'static> Task<T> {
    pub(crate) fn new(work: impl FnOnce() -> T + Send + 'static) -> Arc<Self> {
        Arc::new(Self { phase: Mutex::new(Phase::Waiting(Box::new(work))), ended: Condvar::new() })
    }

    /// Runs the work unless somebody else did or does.
    pub(crate) fn run(&self) {
        let mut phase = guard(&self.phase);
        if !matches!(*phase, Phase::Waiting(_)) {
            return;
        }
        let Phase::Waiting(work) = mem::replace(&mut *phase, Phase::Running) else { return };
        drop(phase);
        let result = match catch_unwind(AssertUnwindSafe(work)) {
            Ok(result) => Phase::Done(result),
            Err(panic) => Phase::Panicked(panic),
        };
        *guard(&self.phase) = result;
        self.ended.notify_all();
    }

    /// The result; computes it if nobody has begun. Blocking: waits for a thread that is at it.
    ///
    /// # Panics
    /// If the work panicked.
    pub(crate) fn join(&self) -> T {
        Self::run(self);
        let running = |phase: &mut Phase<T>| matches!(phase, Phase::Running);
        let mut phase = self.ended.wait_while(guard(&self.phase), running).unwrap_or_else(PoisonError::into_inner);
        match &*phase {
            Phase::Done(result) => result.clone(),
            _ => match mem::replace(&mut *phase, Phase::Lost) {
                Phase::Panicked(panic) => {
                    drop(phase);
                    resume_unwind(panic)
                }
                _ => panic!("a task panicked earlier"),
            },
        }
    }
}

/// What a maintenance thread does.
type Work = Box<dyn FnOnce() + Send>;

/// A thread that does one thing after the other; begun when the first one comes, ended when this is dropped.
#[derive(Default)]
pub(crate) struct Background(OnceLock<Option<Sender<Work>>>);

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").finish_non_exhaustive()
    }
}

impl Background {
    /// Queues a task. If no thread can be had, whoever joins the task runs it; if nobody holds the task any more when
    /// its turn comes, it is skipped.
    pub(crate) fn submit<T: Clone + Send + 'static>(&self, task: &Arc<Task<T>>) {
        let weak = Arc::downgrade(task);
        self.later(move || {
            if let Some(task) = weak.upgrade() {
                task.run();
            }
        });
    }

    /// Queues something that nobody waits for; it is dropped undone if no thread can be had.
    pub(crate) fn later(&self, work: impl FnOnce() + Send + 'static) {
        if let Some(sender) = self.sender() {
            // Fails only when the thread is gone.
            let _ = sender.send(Box::new(work));
        }
    }

    /// Begins the thread, if it was not begun: it inherits cores and priority of the calling one.
    pub(crate) fn start(&self) {
        let _ = self.sender();
    }

    fn sender(&self) -> Option<&Sender<Work>> {
        let begin = || {
            let (sender, receiver) = channel::<Work>();
            let serve = move || receiver.iter().for_each(|work| work());
            // Not joined: a task may own the last reference to the store that owns this, and would wait for itself.
            thread::Builder::new().name("icecache-pack".to_owned()).spawn(serve).ok().map(|_| sender)
        };
        self.0.get_or_init(begin).as_ref()
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::channel;

    use super::{Background, Task};
    use crate::sync::{Arc, AtomicUsize, Ordering};

    #[test]
    fn a_task_runs_once_however_many_threads_need_it() {
        let background = Background::default();
        for _ in 0..if cfg!(miri) { 3 } else { 200 } {
            let runs = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&runs);
            let task = Task::new(move || counted.fetch_add(1, Ordering::Relaxed) + 41);
            background.submit(&task);
            std::thread::scope(|scope| {
                let joins: Vec<_> = (0..3).map(|_| scope.spawn(|| task.join())).collect();
                assert!(joins.into_iter().all(|join| join.join().unwrap() == 41));
            });
            assert_eq!(runs.load(Ordering::Relaxed), 1);
        }
    }

    #[test]
    fn the_thread_runs_tasks_nobody_joins_and_skips_those_nobody_holds() {
        let background = Background::default();
        let (sender, receiver) = channel();
        let (entered, gate) = (channel(), channel::<()>());
        let blocker = Task::new(move || {
            entered.0.send(()).unwrap();
            gate.1.recv().unwrap();
        });
        background.submit(&blocker);
        entered.1.recv().unwrap();
        let tasks: Vec<_> = (0..4)
            .map(|i| {
                let sender = sender.clone();
                let task = Task::new(move || sender.send(i).unwrap());
                background.submit(&task);
                task
            })
            .collect();
        let kept: Vec<_> = tasks.into_iter().step_by(2).collect();
        gate.0.send(()).unwrap();
        drop(sender);
        assert_eq!([receiver.recv(), receiver.recv()], [Ok(0), Ok(2)]);
        for task in &kept {
            task.join();
        }
        assert!(receiver.recv().is_err(), "what nobody holds is dropped unrun");
    }

    #[test]
    fn a_panic_reaches_whoever_needs_the_result() {
        let task = Task::new(|| -> u8 { panic!("no result") });
        let background = Background::default();
        background.submit(&task);
        for _ in 0..2 {
            assert!(catch_unwind(AssertUnwindSafe(|| task.join())).is_err());
        }
    }
}
