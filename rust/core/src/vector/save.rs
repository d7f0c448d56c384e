//! An index as a file: the pages as they are, so that loading packs nothing.
//!
//! | section | per | content |
//! |---|---|---|
//! | `META` | file | dim u32, metric, dtype, center, centred u8, seed, rows, next id, compactions, segments u64 |
//! | `MEAN` | file | dim f32 |
//! | `IDS_` | row | id i64, in the order of positions, removed rows too |
//! | `XTRA` | row | f32: half of the stored row's square (l2), norm as given (cosine); absent for ip |
//! | `CALI` | file | queries u64, dim f32 each; curves u64, each as in `curve.rs`; absent where nothing was measured or given (2.1) |
//! | `OPTN` | file | u8 0: no codes; absent where rows may be scored by codes (2.1) |
//! | `SEGS` | segment | number of pages u8 |
//! | `PAGE` | sealed page | count u8, zero u8, live mask u16, scale, spread, radius, squared norm of the mean f32 |
//! | `LOCL` | sealed page | 16 positions in the segment u16, then zeros |
//! | `LEVL` | sealed page | dim i8: the mean in units of its scale |
//! | `GRUP` | 16 sealed pages | scale f32 and dim i8 of mean, the same of variance |
//! | `TAIL` | row of the tail | live u8 |
//! | `ROWS` | row of the tail | stored row; zeros for a removed one |
//! | `KEYS` | sealed page | 16 stored rows, padded to 64 bytes; zeros where there is no row |
#![forbid(unsafe_code)]

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::container::{Produce, Tag, write};
use super::index::{VectorConfig, VectorIndex};
use super::metric::Metric;
use super::state::State;
use crate::config::{GROUP_PAGES, PAGE_TOKENS, SEGMENT_TOKENS};
use crate::layout::Dtype;
use crate::segment::Segment;

/// Bytes of `META`.
pub(super) const META_BYTES: usize = 48;
/// Bytes of an entry of `PAGE`.
pub(super) const PAGE_BYTES: usize = 20;

impl VectorIndex {
    /// The index as a file in memory. Waits for nobody.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut file = Vec::new();
        // Writing to memory does not fail.
        let _ = self.write_to(&mut file);
        file
    }

    /// Writes one snapshot of the index as a file. Waits for nobody.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_to(&self, out: &mut dyn Write) -> io::Result<()> {
        let state = self.state();
        write(&sections(self.config, &state), out)
    }

    /// Writes one snapshot to `path`: to a new file beside it, which replaces the old one when it is on the disk. A link is
    /// followed and stays; a device or a pipe is written to and stays too.
    ///
    /// # Errors
    /// Those of the file system; then `path` is what it was.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let path = &followed(path);
        if fs::metadata(path).is_ok_and(|old| !old.is_file() && !old.is_dir()) {
            return self.write_to(&mut File::options().write(true).open(path)?);
        }
        let name = path.file_name().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no file name"))?;
        let unique = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), name);
        let beside = path.with_file_name(format!(".{}.{unique:016x}", name.to_string_lossy()));
        let written = (|| {
            // `create_new`: an attacker's file of that name is not followed, and the mode is that of any new file.
            let mut out = BufWriter::with_capacity(1 << 20, File::create_new(&beside)?);
            self.write_to(&mut out)?;
            out.flush()?;
            out.get_ref().sync_all()?;
            fs::rename(&beside, path)
        })();
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
        written
    }
}

/// Where `path` leads by symbolic links, also if nothing is there yet.
fn followed(path: &Path) -> PathBuf {
    let mut path = path.to_path_buf();
    // As many as Linux follows: links may form a circle.
    for _ in 0..40 {
        let Ok(target) = fs::read_link(&path) else { break };
        path.set_file_name(target);
    }
    path
}

fn sections(config: VectorConfig, state: &State) -> Vec<(Tag, Produce<'_>)> {
    let segments: Vec<_> = state.view.snapshot().segments.iter().collect();
    let of_segments = {
        let segments = segments.clone();
        move |f: fn(&Segment, usize, &mut Vec<u8>)| {
            whole(
                segments
                    .iter()
                    .flat_map(move |entry| {
                        let mut bytes = Vec::new();
                        (0..entry.segment.n_pages()).for_each(|page| f(&entry.segment, page, &mut bytes));
                        bytes
                    })
                    .collect(),
            )
        }
    };
    let masks = segments.iter().flat_map(|entry| {
        (0..entry.segment.n_pages()).flat_map(|page| page_entry(&entry.segment, page, entry.mask(page)))
    });
    let ids = state.blocks.iter().flat_map(|block| block.ids.iter()).flat_map(i64::to_le_bytes);
    let mut all = vec![
        (*b"META", whole(meta(config, state))),
        (*b"MEAN", whole(state.mean.iter().flat_map(|value| value.to_le_bytes()).collect())),
        (*b"IDS_", whole(ids.collect())),
        (*b"SEGS", whole(segments.iter().map(|entry| entry.segment.n_pages() as u8).collect())),
        (*b"PAGE", whole(masks.collect())),
        (*b"LOCL", of_segments(locals)),
        (*b"LEVL", of_segments(levels)),
        (*b"GRUP", whole(groups(state))),
        (*b"TAIL", whole(tail_live(state).iter().map(|&live| u8::from(live)).collect())),
        (*b"ROWS", whole(tail_rows(state))),
    ];
    if config.metric != Metric::InnerProduct {
        let extra = state.blocks.iter().flat_map(|block| &block.extra).flat_map(|value| value.to_le_bytes());
        all.push((*b"XTRA", whole(extra.collect())));
    }
    if let Some(bytes) = calibration(state) {
        all.push((*b"CALI", whole(bytes)));
    }
    if !config.codes {
        all.push((*b"OPTN", whole(vec![0])));
    }
    all.push((*b"KEYS", Box::new(move |sink| keys(state, sink))));
    all
}

fn whole<'a>(bytes: Vec<u8>) -> Produce<'a> {
    Box::new(move |sink| sink(&bytes))
}

fn meta(config: VectorConfig, state: &State) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(META_BYTES);
    bytes.extend_from_slice(&(config.dim as u32).to_le_bytes());
    bytes.extend_from_slice(&[config.metric as u8, dtype_code(config.dtype), u8::from(config.center)]);
    bytes.push(u8::from(state.centred));
    let counts = [state.n_rows() as u64, state.next_id, state.compactions as u64, state.n_segments() as u64];
    for field in [config.seed].into_iter().chain(counts) {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

fn calibration(state: &State) -> Option<Vec<u8>> {
    let (queries, curves) = (&state.calibration.queries, state.calibration.curves());
    if queries.is_empty() && curves.is_empty() {
        return None;
    }
    let mut bytes = ((queries.len() / state.dim()) as u64).to_le_bytes().to_vec();
    bytes.extend(queries.iter().flat_map(|value| value.to_le_bytes()));
    bytes.extend_from_slice(&(curves.len() as u64).to_le_bytes());
    curves.iter().for_each(|curve| curve.write(&mut bytes));
    Some(bytes)
}

/// Number of a storage type in files.
pub(super) fn dtype_code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
        Dtype::I8 => 3,
    }
}

fn page_entry(segment: &Segment, page: usize, live: u16) -> Vec<u8> {
    let mut bytes = vec![segment.pages().count(page) as u8, 0];
    bytes.extend_from_slice(&live.to_le_bytes());
    bytes.extend(segment.summaries.numbers(page).iter().flat_map(|number| number.to_le_bytes()));
    bytes
}

fn locals(segment: &Segment, page: usize, out: &mut Vec<u8>) {
    let locals = segment.locals(page);
    let padding = std::iter::repeat_n(&0, PAGE_TOKENS - locals.len());
    out.extend(locals.iter().chain(padding).flat_map(|local| local.to_le_bytes()));
}

fn levels(segment: &Segment, page: usize, out: &mut Vec<u8>) {
    out.extend((0..segment.layout().key_dim).map(|d| segment.summaries.level(page, d).cast_unsigned()));
}

fn groups(state: &State) -> Vec<u8> {
    let mut bytes = Vec::new();
    for entry in state.view.snapshot().segments.iter() {
        debug_assert_eq!(entry.segment.groups().len(), entry.segment.n_pages().div_ceil(GROUP_PAGES));
        entry.segment.groups().iter().for_each(|group| group.write(&mut bytes));
    }
    bytes
}

/// Whether each row of the tail is live.
fn tail_live(state: &State) -> Vec<bool> {
    let start = state.n_segments() * SEGMENT_TOKENS;
    let mut live = vec![false; state.n_rows() - start];
    state.view.rows(start, state.n_rows()).iter().for_each(|(position, _)| live[position - start] = true);
    live
}

fn tail_rows(state: &State) -> Vec<u8> {
    let (start, size) = (state.n_segments() * SEGMENT_TOKENS, state.layout().key_bytes());
    let mut bytes = vec![0; (state.n_rows() - start) * size];
    for (position, row) in state.view.rows(start, state.n_rows()) {
        bytes[(position - start) * size..][..size].copy_from_slice(row.key);
    }
    bytes
}

fn keys(state: &State, sink: &mut dyn FnMut(&[u8])) {
    let zeros = vec![0; state.layout().page_bytes()];
    for entry in state.view.snapshot().segments.iter() {
        for page in 0..entry.segment.n_pages() {
            let rows = entry.segment.pages().keys(page);
            sink(rows);
            sink(&zeros[rows.len()..]);
        }
    }
}
