//! Sizes of the structure and the options of a search.
#![forbid(unsafe_code)]

use crate::error::{Error, Result};

/// Tokens of a page: the leaf of the tree and the unit of transfer.
pub const PAGE_TOKENS: usize = 16;
/// Consecutive tokens that are packed into one immutable segment. Measured: 1024 to 2048 lose nothing against packing
/// the whole sequence at once, and cost `n * 1024 / 32` dot products instead of `n * n`.
pub const SEGMENT_TOKENS: usize = match (cfg!(any(loom, miri)), cfg!(feature = "stress")) {
    (true, _) => 256,
    (_, true) => 512,
    _ => 1024,
};
/// Most pages of a segment, and the stride of page ordinals per segment.
pub const SEGMENT_PAGES: usize = SEGMENT_TOKENS / PAGE_TOKENS;
/// Pages of a super-group: one block of the summary scan.
pub(crate) const GROUP_PAGES: usize = 16;
/// Tokens of a stretch that is sealed before its segment is complete: one block of summaries.
pub(crate) const PART_TOKENS: usize = GROUP_PAGES * PAGE_TOKENS;
/// Super-groups of a full segment.
pub(crate) const SEGMENT_GROUPS: usize = SEGMENT_PAGES / GROUP_PAGES;
/// Neighbours of a seed that the packing ranks again (32 is as good as all, measured).
pub(crate) const PACK_CANDIDATES: usize = 32;
/// Re-ranking rounds of the packing against the members' mean.
pub(crate) const PACK_ROUNDS: usize = 2;
/// Fewest pages that the second stage scores exactly: a trade of time for mass. Sharp queries of a trained model lose
/// .017 of the mass with 96, .012 with 128 and .006 with 192 (13 pages of 16k keys, README).
pub(crate) const MIN_CANDIDATES: usize = 112;
/// How far along the query the keys of a page are taken to reach beyond their mean when its log-sum-exp is estimated, as
/// a share of the page's radius. Unbiased on the keys of a trained model (README).
pub(crate) const REACH: f32 = 0.1;
/// The same when candidates are ranked: a page whose farthest key points along the query must not be overlooked.
/// Measured: 0 loses .028 of the mass, .25 loses .017 with 96 candidates (13 pages of 16k keys); .5 is worse again.
pub(crate) const CANDIDATE_REACH: f32 = 0.25;
/// How far along the query a coded key is taken to reach beyond its code, as a share of `.75 sqrt(dim)` fits: of the part
/// that one bit per element leaves out. Measured with .1 to .35 (docs/LOG.md).
pub(crate) const CODE_ROOM: f32 = 0.2 * 0.75;
/// Sealed pages above which super-groups are visited instead of all pages, where these are ranked by the codes of their
/// keys: a group's summary hides a single key as a page's mean does.
pub(crate) const FLAT_CODED_PAGES: usize = 16 * 1024;
/// The same where pages are ranked by their means.
pub(crate) const FLAT_PAGES: usize = 4096;
/// At least one in so many super-groups is visited, whatever their estimates.
pub(crate) const MIN_PROBED_PART: usize = 6;
/// Default of [`SearchOptions::probe_mass`].
pub(crate) const PROBE_MASS: f32 = 0.9;

/// When the tail of a tree is packed into segments.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Sealing {
    /// As soon as it holds 1024 tokens, by the thread that adds the last of them.
    #[default]
    Segments,
    /// 1024 tokens are packed aside and take their place 256 tokens later: nobody waits unless the packing is late.
    Background,
    /// 256 tokens are packed aside and take their place 128 tokens later; four such stretches are packed into one
    /// segment in the same way.
    Tiers,
    /// Never: full pages split for ever. Costs mass and time; the control of the drift benchmark.
    Never,
}

impl Sealing {
    /// Tokens that are packed aside at a time, if any are.
    pub(crate) fn stretch(self) -> Option<usize> {
        match self {
            Self::Segments | Self::Never => None,
            Self::Background => Some(SEGMENT_TOKENS),
            Self::Tiers => Some(PART_TOKENS),
        }
    }

    /// Tokens that are added between the end of a stretch and the moment its packed form takes its place, in tree `head` of
    /// a forest of `n_heads`. Decoding adds one in about 10 ms; one thread packs 1024 tokens of 32 layers x 8 heads in
    /// about 600 ms. The heads are spread over as many tokens again: where packing is late, inserting 16 tokens waits for
    /// one head of eight.
    pub(crate) fn lag(self, head: usize, n_heads: usize) -> usize {
        let first = match self {
            Self::Segments | Self::Never => 0,
            Self::Background => 256,
            // The interpreter of `make miri` would not get to the end of the lag in minutes.
            Self::Tiers if cfg!(miri) => 8,
            Self::Tiers => 128,
        };
        first + first * head / n_heads
    }
}

/// How a search ranks and how much it looks at.
#[derive(Debug, Clone, PartialEq)]
pub struct SearchOptions {
    /// Pages wanted per KV head.
    pub k: usize,
    /// Factor of `query . key` before the softmax; the attention module's own.
    pub scaling: f32,
    /// `softcap * tanh(logit / softcap)` is applied to scaled logits when given.
    pub softcap: Option<f32>,
    /// Pages scored exactly; default `max(6 k, 112)`. Raised to `k` when smaller.
    pub candidates: Option<usize>,
    /// Estimated share of the softmax mass that the visited super-groups must hold, in `(0, 1]`. Used above
    /// 16,384 sealed pages (4096 without codes of keys); 1 visits all, and a sixth of the groups is visited in any case.
    pub probe_mass: Option<f32>,
    /// Score every page exactly.
    pub exact: bool,
    /// Estimate what the pages that are not chosen would give; needs a store with mean values.
    pub estimate_unread: bool,
}

impl SearchOptions {
    /// Options with all defaults for `k` pages and the given scaling.
    #[must_use]
    pub fn new(k: usize, scaling: f32) -> Self {
        Self { k, scaling, softcap: None, candidates: None, probe_mass: None, exact: false, estimate_unread: false }
    }

    /// Pages that the second stage scores.
    pub(crate) fn n_candidates(&self) -> usize {
        if self.exact {
            return usize::MAX;
        }
        self.candidates.unwrap_or_else(|| self.k.saturating_mul(6).max(MIN_CANDIDATES)).max(self.k)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |name, expected, received: String| Err(Error::Option { name, expected, received });
        if !(self.scaling.is_finite() && self.scaling > 0.0) {
            return wrong("scaling", "a positive finite number", self.scaling.to_string());
        }
        if let Some(cap) = self.softcap
            && !(cap.is_finite() && cap > 0.0)
        {
            return wrong("softcap", "a positive finite number", cap.to_string());
        }
        if let Some(mass) = self.probe_mass
            && !(mass > 0.0 && mass <= 1.0)
        {
            return wrong("probe_mass", "a number in (0, 1]", mass.to_string());
        }
        Ok(())
    }
}
