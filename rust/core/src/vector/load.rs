//! An index from a file: copied into pages of its own, or mapped and read-only.
//!
//! Copied, every byte is checked and the summaries of the pages are computed again from their rows. Mapped, all but the
//! pages is read and checked, the pages only on demand; then rows are whatever the file holds: no content of it can
//! make a search read outside of it, but a damaged row may be found or missed wrongly, which `verify` excludes.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::codes;
use super::container::Sections;
use super::content::{Content, SegmentContent, read};
use super::error::{Result, VectorError};
use super::index::VectorIndex;
use super::metric::check_stored_rows;
use super::regroup::Runs;
use super::state::{Block, State};
use crate::arena::{Lease, PageStore};
use crate::config::SEGMENT_TOKENS;
use crate::extend::{ExtendRow, extend};
use crate::forest::Forest;
use crate::layout::PageLayout;
use crate::page::{MappedPages, Mapping, Row, SealedPages};
use crate::segment::Segment;
use crate::state::SegmentEntry;

impl VectorIndex {
    /// The index of a file in memory, copied.
    ///
    /// # Errors
    /// If the bytes are not a complete, unchanged file of this version.
    pub fn from_bytes(pool: &ThreadPool, file: &[u8]) -> Result<Self> {
        let content = read(&Sections::read(file, None)?)?;
        let forest = content.config.new_forest()?;
        let layout = forest.store().layout();
        let pages = &file[content.keys.clone()];
        check_rows(layout, pages, pool)?;
        let leases = content.segments.iter().map(|segment| forest.store().lease(segment.counts.len()));
        let leases = leases.collect::<std::result::Result<Vec<Lease>, _>>()?;
        let restore = |(segment, lease): (&SegmentContent<'_>, Lease)| {
            let rows = pages_of(segment, layout, pages);
            let sealed = SealedPages::write(lease, rows);
            entry(Segment::of_pages(sealed, segment.locals.clone()), segment)
        };
        let entries = pool.install(|| content.segments.par_iter().zip(leases).map(restore).collect());
        let ((config, mut state), forest) = finish(pool, content, entries, forest.store())?;
        // A mapped index has none: they are made from all rows, and it should not read them.
        if config.codes {
            state.codes = pool.install(|| codes::renew(None, &state.view, config.metric, &state.mean));
        }
        Ok(Self::from_parts(config, Some(forest), state))
    }

    /// Maps a file: a read-only index that needs little memory and is there at once. With `verify`, all of the file is
    /// read and checked, else all but its pages. The file must not be changed while it is mapped; replacing it by
    /// [`save`](Self::save) is fine.
    ///
    /// # Errors
    /// If the file cannot be mapped or is not a complete, unchanged file of this version.
    pub fn open_mapped(pool: &ThreadPool, path: &Path, verify: bool) -> Result<Self> {
        let file = File::open(path)?;
        if file.metadata()?.len() == 0 {
            return Err(VectorError::format("it is empty"));
        }
        // SAFETY: the mapping is read-only. Memory safety rests on the file not shrinking or changing while it is
        // mapped, which this function's documentation asks of the caller and no library can enforce.
        let bytes = unsafe { memmap2::Mmap::map(&file)? };
        let bytes: Mapping = Arc::new(bytes);
        Self::of_mapping(pool, &bytes, verify)
    }

    /// As [`open_mapped`](Self::open_mapped), over bytes that are there already.
    ///
    /// # Errors
    /// If the bytes are not a complete, unchanged file of this version.
    pub fn of_mapping(pool: &ThreadPool, mapping: &Arc<dyn AsRef<[u8]> + Send + Sync>, verify: bool) -> Result<Self> {
        let file = (**mapping).as_ref();
        let content = read(&Sections::read(file, (!verify).then_some(*b"KEYS"))?)?;
        let forest = content.config.new_forest()?;
        let layout = forest.store().layout();
        if verify {
            check_rows(layout, &file[content.keys.clone()], pool)?;
        }
        let map = |segment: &SegmentContent<'_>| {
            let pages = mapped(segment, layout, Arc::clone(mapping), content.keys.start);
            let (dim, locals) = (layout.key_dim, segment.locals.clone());
            Ok(entry(Segment::of_parts(pages, locals, segment.summaries(dim), segment.groups(dim)?), segment))
        };
        let entries: Vec<SegmentEntry> = content.segments.iter().map(map).collect::<Result<_>>()?;
        if verify && !entries.iter().all(|entry| entry.segment.has_current_summaries()) {
            return Err(VectorError::format("the summaries are not those of the pages"));
        }
        let (state, _) = finish(pool, content, entries, forest.store())?;
        Ok(Self::from_parts(state.0, None, state.1))
    }
}

/// Rows of a segment's pages in the file.
fn pages_of<'a>(
    segment: &SegmentContent<'_>,
    layout: PageLayout,
    pages: &'a [u8],
) -> impl Iterator<Item = Vec<Row<'a>>> {
    let start = segment.first_page * layout.page_bytes();
    let pages = pages[start..].chunks_exact(layout.page_bytes());
    segment.counts.iter().zip(pages).map(move |(&count, page)| {
        page.chunks_exact(layout.key_bytes()).take(count as usize).map(|key| Row { key, value: &[] }).collect()
    })
}

fn mapped(segment: &SegmentContent<'_>, layout: PageLayout, bytes: Mapping, start: usize) -> SealedPages {
    let start = start + segment.first_page * layout.page_bytes();
    let pages = MappedPages { bytes, start, layout, first: segment.first_page as u32 };
    SealedPages::mapped(pages, segment.counts.clone())
}

fn entry(segment: Segment, content: &SegmentContent<'_>) -> SegmentEntry {
    let complete =
        content.masks.iter().zip(&content.counts).all(|(mask, &count)| mask.count_ones() == u32::from(count));
    let segment = Arc::new(segment);
    if complete {
        return SegmentEntry { segment, live: None };
    }
    SegmentEntry::masked(segment, content.masks.to_vec())
}

/// Refuses pages with a row that could not have been stored.
fn check_rows(layout: PageLayout, pages: &[u8], pool: &ThreadPool) -> Result<()> {
    let check = |page: &[u8]| {
        let mut row = vec![0.0; layout.key_dim];
        page.chunks_exact(layout.key_bytes()).take(crate::PAGE_TOKENS).try_for_each(|key| {
            crate::rows::decode(layout.dtype, key, &mut row);
            check_stored_rows("KEYS", &row, layout.key_dim)
        })
    };
    let pages = || pages.par_chunks_exact(layout.page_bytes()).map(check).find_any(Result::is_err);
    pool.install(pages).unwrap_or(Ok(())).map_err(|error| VectorError::format(error.to_string()))
}

/// Forest and state of the segments, the tail inserted again.
fn finish(
    pool: &ThreadPool,
    content: Content<'_>,
    entries: Vec<SegmentEntry>,
    store: &Arc<PageStore>,
) -> Result<((super::index::VectorConfig, State), Forest)> {
    let config = content.config;
    check_stored_rows("MEAN", &content.mean, config.dim).map_err(|error| VectorError::format(error.to_string()))?;
    let mut tail = vec![0.0; content.tail_live.len() * config.dim];
    crate::rows::decode(config.dtype, content.tail_rows, &mut tail);
    check_stored_rows("ROWS", &tail, config.dim).map_err(|error| VectorError::format(error.to_string()))?;
    let forest = Forest::of_segments(Arc::clone(store), entries);
    let sealed = content.segments.len() * SEGMENT_TOKENS;
    extend(pool, &[ExtendRow { forest: &forest, keys: content.tail_rows, values: &[] }])?;
    let dead = content.tail_live.iter().enumerate().filter(|(_, live)| !**live);
    let dead: Vec<usize> = dead.map(|(at, _)| sealed + at).collect();
    if !dead.is_empty() {
        forest.remove(&dead)?;
    }
    let n_live = content.n_live();
    let blocks = content.ids.chunks(SEGMENT_TOKENS).enumerate().map(|(j, ids)| {
        let extra = content.extra.chunks(SEGMENT_TOKENS).nth(j).unwrap_or_default().to_vec();
        let mut block = Block { extra, ..Block::default() };
        block.ids.extend(ids);
        Arc::new(block)
    });
    let mut state = State {
        blocks: blocks.collect(),
        view: forest.heads()[0].view(),
        n_live,
        centred: content.centred,
        next_id: content.next_id,
        // A file does not say how its rows came.
        runs: Runs::packed(sealed),
        compactions: content.compactions,
        mean: content.mean.into(),
        calibration: Arc::new(content.calibration),
        ..State::empty(config, &forest)
    };
    state.enter_ids(0);
    Ok(((config, state), forest))
}
