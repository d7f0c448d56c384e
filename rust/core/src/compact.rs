//! Packing again what removals have thinned: fewer, full pages with the same tokens at the same positions.
#![forbid(unsafe_code)]

use rayon::ThreadPool;
use rayon::prelude::*;

use crate::arena::Lease;
use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::forest::Forest;
use crate::groups::Segments;
use crate::segment::Segment;
use crate::state::{SegmentEntry, State, Tail, TailEntry, Tree, Trees};
use crate::sync::Arc;
use crate::tail::{live_rows, pack_tail};

/// A thinned piece of one tree.
enum Thin {
    Segment { number: usize, entry: SegmentEntry },
    Tail(Arc<Tail>),
}

/// The piece, packed.
enum Packed {
    Segment(Arc<Segment>),
    Tail(Vec<TailEntry>),
}

impl Forest {
    /// Packs again every segment, and every tail, of which removals have left less than `min_live` of the tokens it holds
    /// in its pages. Positions stay what they are; pages get other ids. Returns how many pieces were packed.
    ///
    /// Searches are never delayed and see all of it at once. Lock-free: pieces that another thread changes meanwhile
    /// are left to the next call. One task is one segment. The result does not depend on the number of threads.
    ///
    /// # Errors
    /// If `min_live` is not in 0..=1 or the store has no room for the new pages beside the old ones; nothing changes then.
    pub fn compact(&self, pool: &ThreadPool, min_live: f32) -> Result<usize> {
        if !(0.0..=1.0).contains(&min_live) {
            let received = min_live.to_string();
            return Err(Error::Option { name: "min_live", expected: "a number in 0..=1", received });
        }
        let state = self.shared().load();
        let heads = state.trees.heads.iter().enumerate();
        let thin: Vec<(usize, Thin)> =
            heads.flat_map(|(h, tree)| thinned(tree, min_live).into_iter().map(move |piece| (h, piece))).collect();
        if thin.is_empty() {
            return Ok(0);
        }
        // In order and before anything else, as in `grow`.
        let leases =
            thin.iter().map(|(_, piece)| self.store().lease(piece.n_pages())).collect::<Result<Vec<Lease>>>()?;
        let packed: Vec<Packed> =
            pool.install(|| thin.par_iter().zip(leases).map(|((_, piece), lease)| piece.pack(lease)).collect());
        let mut n_packed = 0;
        self.shared().update(|current| {
            n_packed = 0;
            let heads = current.trees.heads.iter().enumerate().map(|(h, tree)| {
                let mine = thin.iter().zip(&packed).filter(|((head, _), _)| *head == h);
                replaced(tree, mine.map(|((_, thin), packed)| (thin, packed)), &mut n_packed)
            });
            let heads = heads.collect();
            let trees = Trees { heads, tokens: current.trees.tokens, removals: current.trees.removals };
            (n_packed > 0).then(|| State { trees: Arc::new(trees), pending: current.pending.clone() })
        });
        Ok(n_packed)
    }
}

/// The pieces of a tree with too few live tokens.
fn thinned(tree: &Tree, min_live: f32) -> Vec<Thin> {
    let is_thin = |live: usize, all: usize| live < all && (live as f32) < min_live * all as f32;
    let segments = tree.segments.iter().enumerate().filter_map(|(number, entry)| {
        let thin = entry.live.is_some() && is_thin(entry.n_live(), entry.segment.n_tokens());
        thin.then(|| Thin::Segment { number, entry: entry.clone() })
    });
    let count = |f: fn(&TailEntry) -> u32| tree.tail.entries.iter().map(f).sum::<u32>() as usize;
    let (live, all) = (count(|entry| entry.mask().count_ones()), count(|entry| u32::from(entry.count)));
    let tail = is_thin(live, all).then(|| Thin::Tail(Arc::clone(&tree.tail)));
    segments.chain(tail).collect()
}

impl Thin {
    fn n_pages(&self) -> usize {
        let live = match self {
            Self::Segment { entry, .. } => entry.n_live(),
            Self::Tail(tail) => tail.entries.iter().map(|entry| entry.mask().count_ones() as usize).sum(),
        };
        live.div_ceil(PAGE_TOKENS)
    }

    fn pack(&self, lease: Lease) -> Packed {
        match self {
            Self::Segment { entry, .. } => Packed::Segment(Arc::new(Segment::build(lease, &entry.rows()))),
            Self::Tail(tail) => {
                let mut rows: Vec<_> = tail.entries.iter().flat_map(live_rows).collect();
                rows.sort_unstable_by_key(|(token, _)| *token);
                Packed::Tail(pack_tail(lease, &rows))
            }
        }
    }
}

/// The tree with its pieces replaced, but for those that are not what they were when they were packed.
fn replaced<'a>(tree: &Tree, pieces: impl Iterator<Item = (&'a Thin, &'a Packed)>, n_packed: &mut usize) -> Tree {
    let mut entries = tree.segments.to_vec();
    let mut tail = Arc::clone(&tree.tail);
    for piece in pieces {
        match piece {
            (Thin::Segment { number, entry }, Packed::Segment(segment)) => {
                if let Some(current) = entries.get_mut(*number).filter(|current| current.is_same(entry)) {
                    *current = SegmentEntry::whole(Arc::clone(segment));
                    *n_packed += 1;
                }
            }
            (Thin::Tail(old), Packed::Tail(entries)) if Arc::ptr_eq(old, &tail) => {
                tail = Tail::new(old.start, entries.clone(), None);
                *n_packed += 1;
            }
            _ => {}
        }
    }
    let segments: Segments = tree.segments.with_entries(entries);
    Tree { segments: Arc::new(segments), frozen: tree.frozen.clone(), tail }
}
