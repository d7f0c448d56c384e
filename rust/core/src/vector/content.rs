//! What a file says, checked: nothing here is trusted before it was looked at.
#![forbid(unsafe_code)]

use std::ops::Range;

use super::calibrate::{Calibration, MOST_CURVES, SAMPLE};
use super::container::{Sections, u32_at, u64_at};
use super::curve::Curve;
use super::error::{Result, VectorError};
use super::index::VectorConfig;
use super::metric::{MAX_NORM, Metric, check_rows};
use super::save::{META_BYTES, PAGE_BYTES, dtype_code};
use crate::config::{GROUP_PAGES, PAGE_TOKENS, SEGMENT_PAGES, SEGMENT_TOKENS};
use crate::groups::GroupSummary;
use crate::layout::{Dtype, PageLayout};
use crate::segment::Summaries;
use crate::state::full_mask;

/// Everything beside the pages.
pub(super) struct Content<'a> {
    pub(super) config: VectorConfig,
    pub(super) centred: bool,
    pub(super) next_id: u64,
    pub(super) compactions: usize,
    pub(super) mean: Vec<f32>,
    /// By position.
    pub(super) ids: Vec<i64>,
    pub(super) extra: Vec<f32>,
    pub(super) segments: Vec<SegmentContent<'a>>,
    pub(super) calibration: Calibration,
    pub(super) tail_live: Vec<bool>,
    pub(super) tail_rows: &'a [u8],
    /// Where the sealed pages are.
    pub(super) keys: Range<usize>,
}

/// Everything of a segment beside its pages.
pub(super) struct SegmentContent<'a> {
    pub(super) counts: Box<[u8]>,
    pub(super) masks: Box<[u16]>,
    pub(super) locals: Box<[u16]>,
    /// Number of its first page in the file.
    pub(super) first_page: usize,
    numbers: Vec<[f32; 4]>,
    levels: &'a [i8],
    groups: &'a [u8],
}

impl SegmentContent<'_> {
    pub(super) fn summaries(&self, dim: usize) -> Summaries {
        let counts = self.counts.iter().map(|&count| count as usize);
        let pages = counts.zip(&self.numbers).zip(self.levels.chunks_exact(dim));
        Summaries::of_parts(dim, pages.map(|((count, numbers), levels)| (count, *numbers, levels)))
    }

    pub(super) fn groups(&self, dim: usize) -> Result<Vec<GroupSummary>> {
        let read = |bytes| GroupSummary::read(bytes, dim).ok_or_else(|| VectorError::format("section GRUP is wrong"));
        self.groups.chunks_exact(GroupSummary::stored_bytes(dim)).map(read).collect()
    }
}

/// Reads and checks all sections but `KEYS`, of which only the length is looked at.
pub(super) fn read<'a>(sections: &Sections<'a>) -> Result<Content<'a>> {
    let meta = sections.bytes(*b"META", 1, META_BYTES)?;
    let codes = match sections.optional(*b"OPTN") {
        None => true,
        Some([0]) => false,
        Some(_) => return Err(VectorError::format("section OPTN holds an unknown option")),
    };
    let config = VectorConfig { codes, ..config(meta)? };
    let count = |at| usize::try_from(u64_at(meta, at)).map_err(|_| VectorError::format("too many rows"));
    let (n_rows, compactions, n_segments) = (count(16)?, count(32)?, count(40)?);
    let next_id = u64_at(meta, 24);
    let sealed = n_segments.checked_mul(SEGMENT_TOKENS).filter(|&sealed| sealed <= n_rows);
    let n_tail = sealed.map(|sealed| n_rows - sealed).filter(|_| n_rows < u32::MAX as usize);
    let n_tail = n_tail.ok_or_else(|| VectorError::format(format!("{n_segments} segments for {n_rows} rows")))?;
    let mean = floats(sections.bytes(*b"MEAN", config.dim, 4)?, "MEAN")?;
    let (ids, _) = sections.bytes(*b"IDS_", n_rows, 8)?.as_chunks::<8>();
    let ids: Vec<i64> = ids.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let extra = match config.metric {
        Metric::InnerProduct => Vec::new(),
        _ => floats(sections.bytes(*b"XTRA", n_rows, 4)?, "XTRA")?,
    };
    let limit = if config.metric == Metric::Cosine { MAX_NORM } else { 3.0 * MAX_NORM * MAX_NORM };
    if extra.iter().any(|&value| !(0.0..=limit as f32).contains(&value)) {
        return Err(VectorError::format("section XTRA holds a norm that no vector has"));
    }
    let (segments, n_pages) = segments(sections, config.dim, n_segments)?;
    let layout = PageLayout::new(config.dtype, config.dim, 0)?;
    let tail_live = flags(sections.bytes(*b"TAIL", n_tail, 1)?)?;
    let content = Content {
        config,
        centred: meta[7] == 1,
        next_id,
        compactions,
        mean,
        ids,
        extra,
        segments,
        calibration: calibration(sections, config.dim)?,
        tail_live,
        tail_rows: sections.bytes(*b"ROWS", n_tail, layout.key_bytes())?,
        keys: sections.range(*b"KEYS", n_pages, layout.page_bytes())?,
    };
    content.check_ids()?;
    Ok(content)
}

impl Content<'_> {
    /// Positions of live rows.
    fn live(&self) -> impl Iterator<Item = usize> {
        let sealed = self.segments.iter().enumerate().flat_map(|(j, segment)| {
            let slots = segment.locals.iter().enumerate();
            let live = slots.filter(|(at, _)| segment.masks[at / PAGE_TOKENS] >> (at % PAGE_TOKENS) & 1 == 1);
            live.map(move |(_, &local)| j * SEGMENT_TOKENS + local as usize)
        });
        let start = self.segments.len() * SEGMENT_TOKENS;
        let tail = self.tail_live.iter().enumerate().filter(|(_, live)| **live);
        sealed.chain(tail.map(move |(at, _)| start + at))
    }

    pub(super) fn n_live(&self) -> usize {
        self.live().count()
    }

    fn check_ids(&self) -> Result<()> {
        if self.ids.iter().any(|&id| id < 0) {
            return Err(VectorError::format("section IDS_ holds a negative id"));
        }
        if self.next_id > 1 << 63 || self.ids.iter().any(|&id| id as u64 >= self.next_id) {
            return Err(VectorError::format("the next id is out of range or taken"));
        }
        let mut live: Vec<i64> = self.live().map(|position| self.ids[position]).collect();
        live.sort_unstable();
        if live.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(VectorError::format("section IDS_ holds an id twice"));
        }
        Ok(())
    }
}

fn config(meta: &[u8]) -> Result<VectorConfig> {
    let metrics = [Metric::InnerProduct, Metric::SquaredL2, Metric::Cosine];
    let metric = metrics.into_iter().find(|metric| *metric as u8 == meta[4]);
    let dtype =
        [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I8].into_iter().find(|dtype| dtype_code(*dtype) == meta[5]);
    let (Some(metric), Some(dtype), true) = (metric, dtype, meta[6] <= 1 && meta[7] <= 1) else {
        return Err(VectorError::format("section META names an unknown metric, dtype or flag"));
    };
    let config = VectorConfig {
        dim: u32_at(meta, 0) as usize,
        metric,
        dtype,
        center: meta[6] == 1,
        seed: u64_at(meta, 8),
        codes: true,
    };
    config.check().map_err(|error| VectorError::format(error.to_string()))?;
    Ok(config)
}

/// The segments, and the pages of all of them.
fn segments<'a>(sections: &Sections<'a>, dim: usize, n: usize) -> Result<(Vec<SegmentContent<'a>>, usize)> {
    let sizes = sections.bytes(*b"SEGS", n, 1)?;
    if sizes.iter().any(|&pages| pages as usize > SEGMENT_PAGES) {
        return Err(VectorError::format("section SEGS names more than 64 pages"));
    }
    let n_pages = sizes.iter().map(|&pages| pages as usize).sum();
    let n_groups = sizes.iter().map(|&pages| (pages as usize).div_ceil(GROUP_PAGES)).sum();
    let pages = sections.bytes(*b"PAGE", n_pages, PAGE_BYTES)?;
    let locals = sections.bytes(*b"LOCL", n_pages, 2 * PAGE_TOKENS)?;
    let levels: &[i8] = bytemuck::cast_slice(sections.bytes(*b"LEVL", n_pages, dim)?);
    let group_bytes = GroupSummary::stored_bytes(dim);
    let groups = sections.bytes(*b"GRUP", n_groups, group_bytes)?;
    let (mut page, mut group) = (0, 0);
    let mut found = Vec::with_capacity(n);
    for &size in sizes {
        let (end, group_end) = (page + size as usize, group + (size as usize).div_ceil(GROUP_PAGES));
        found.push(segment(
            page,
            &pages[page * PAGE_BYTES..end * PAGE_BYTES],
            &locals[page * 2 * PAGE_TOKENS..end * 2 * PAGE_TOKENS],
            &levels[page * dim..end * dim],
            &groups[group * group_bytes..group_end * group_bytes],
        )?);
        (page, group) = (end, group_end);
    }
    Ok((found, n_pages))
}

fn segment<'a>(
    first_page: usize,
    pages: &[u8],
    locals: &[u8],
    levels: &'a [i8],
    groups: &'a [u8],
) -> Result<SegmentContent<'a>> {
    let wrong = || VectorError::format("section PAGE holds a page that cannot be");
    let (mut counts, mut masks, mut numbers) = (Vec::new(), Vec::new(), Vec::new());
    let entries: Vec<&[u8]> = pages.chunks_exact(PAGE_BYTES).collect();
    for (at, entry) in entries.iter().enumerate() {
        let (count, mask) = (entry[0] as usize, u16::from_le_bytes([entry[2], entry[3]]));
        // Only the last page of a segment can be short.
        let least = if at + 1 == entries.len() { 1 } else { PAGE_TOKENS };
        if !(least..=PAGE_TOKENS).contains(&count) || entry[1] != 0 || mask & !full_mask(count) != 0 {
            return Err(wrong());
        }
        let values = floats(&entry[4..], "PAGE")?;
        let values: [f32; 4] = values.try_into().map_err(|_| wrong())?;
        if values.iter().any(|&value| value < 0.0) {
            return Err(wrong());
        }
        counts.push(count as u8);
        masks.push(mask);
        numbers.push(values);
    }
    let (raw, _) = locals.as_chunks::<2>();
    let raw: Vec<u16> = raw.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
    let n_rows = counts.iter().map(|&count| count as usize).sum();
    let (locals, padding) = raw.split_at(n_rows);
    let ascending = locals.chunks(PAGE_TOKENS).all(|page| page.windows(2).all(|pair| pair[0] < pair[1]));
    let mut seen = [false; SEGMENT_TOKENS];
    let mut fresh = |local: u16| seen.get_mut(local as usize).is_some_and(|seen| !std::mem::replace(seen, true));
    if !ascending || !locals.iter().all(|&local| fresh(local)) || padding.iter().any(|&local| local != 0) {
        return Err(VectorError::format("section LOCL holds positions that are not those of one segment"));
    }
    Ok(SegmentContent {
        counts: counts.into_boxed_slice(),
        masks: masks.into_boxed_slice(),
        locals: locals.into(),
        first_page,
        numbers,
        levels,
        groups,
    })
}

fn calibration(sections: &Sections<'_>, dim: usize) -> Result<Calibration> {
    let Some(bytes) = sections.optional(*b"CALI") else { return Ok(Calibration::default()) };
    let wrong = || VectorError::format("section CALI has another length");
    let count = |bytes: &[u8]| (bytes.len() >= 8).then(|| u64_at(bytes, 0)).ok_or_else(wrong);
    let n_queries = usize::try_from(count(bytes)?).ok().filter(|&n| n <= SAMPLE).ok_or_else(wrong)?;
    let (queries, bytes) = bytes[8..].split_at_checked(n_queries * dim * 4).ok_or_else(wrong)?;
    let queries = floats(queries, "CALI")?;
    check_rows("CALI", &queries, dim).map_err(|error| VectorError::format(error.to_string()))?;
    let (n_curves, mut rest) = (count(bytes)?, &bytes[8..]);
    if n_curves > MOST_CURVES as u64 {
        return Err(VectorError::format(format!("section CALI holds {n_curves} curves")));
    }
    let curves = (0..n_curves).map(|_| Curve::read(&mut rest)).collect::<Result<_>>()?;
    if rest.is_empty() { Ok(Calibration::of_parts(queries, curves)) } else { Err(wrong()) }
}

fn flags(bytes: &[u8]) -> Result<Vec<bool>> {
    if bytes.iter().any(|&flag| flag > 1) {
        return Err(VectorError::format("section TAIL holds an unknown flag"));
    }
    Ok(bytes.iter().map(|&flag| flag == 1).collect())
}

fn floats(bytes: &[u8], name: &str) -> Result<Vec<f32>> {
    let (blocks, _) = bytes.as_chunks::<4>();
    let values: Vec<f32> = blocks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if values.iter().all(|value| value.is_finite()) {
        return Ok(values);
    }
    Err(VectorError::format(format!("section {name} holds a NaN or an infinity")))
}
