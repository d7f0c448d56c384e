//! The file of an index, version 1, little-endian.
//!
//! ```text
//! 0   magic "ICEX" | u16 major | u16 minor | u32 0x01020304 | u32 number of sections
//! 16  u64 bytes in all | u64 xxh3 of the first 24 bytes and the section table
//! 32  section table: { u32 tag, u32 zero, u64 offset, u64 bytes, u64 xxh3 } each
//! ..  sections, each at a multiple of 64; the gaps are zero
//! ```
//! Sections: `META` (fixed fields), `MEAN` (dim f32), `IDS_` (n i64), `NORM` (n f32, cosine only), `KEYS` (stored
//! rows). Rows are in the order of the tree, so a reader that packs them again gets the same pages. Unknown tags are
//! skipped in a newer minor version; another major version is refused. Every byte is covered by a hash or must be zero.
#![forbid(unsafe_code)]

use xxhash_rust::xxh3::xxh3_64;

use super::error::{Result, VectorError};
use super::index::VectorConfig;
use super::metric::{MAX_NORM, Metric};
use crate::layout::Dtype;

const MAGIC: [u8; 4] = *b"ICEX";
const MAJOR: u16 = 1;
const MINOR: u16 = 0;
const ENDIAN: u32 = 0x0102_0304;
const HEADER: usize = 32;
const ENTRY: usize = 32;
const ALIGN: usize = 64;
/// More sections than any version will have; bounds what a hostile header makes us read.
const MAX_SECTIONS: usize = 64;
const META_BYTES: usize = 40;

/// Everything that a file holds.
pub(super) struct Content {
    pub(super) config: VectorConfig,
    /// Whether the mean was taken out of the rows.
    pub(super) centred: bool,
    pub(super) next_id: u64,
    pub(super) mean: Vec<f32>,
    pub(super) ids: Vec<i64>,
    pub(super) norms: Vec<f32>,
    pub(super) keys: Vec<u8>,
}

pub(super) fn to_bytes(content: &Content) -> Vec<u8> {
    let mut sections: Vec<([u8; 4], Vec<u8>)> = vec![
        (*b"META", meta_bytes(content)),
        (*b"MEAN", content.mean.iter().flat_map(|value| value.to_le_bytes()).collect()),
        (*b"IDS_", content.ids.iter().flat_map(|id| id.to_le_bytes()).collect()),
    ];
    if content.config.metric == Metric::Cosine {
        sections.push((*b"NORM", content.norms.iter().flat_map(|value| value.to_le_bytes()).collect()));
    }
    let mut table = Vec::with_capacity(ENTRY * (sections.len() + 1));
    let mut end = HEADER + ENTRY * (sections.len() + 1);
    let keys = [(b"KEYS", content.keys.as_slice())];
    let all = sections.iter().map(|(tag, bytes)| (tag, bytes.as_slice())).chain(keys);
    for (tag, bytes) in all.clone() {
        end = end.next_multiple_of(ALIGN);
        table.extend_from_slice(tag);
        table.extend_from_slice(&[0; 4]);
        for field in [end as u64, bytes.len() as u64, xxh3_64(bytes)] {
            table.extend_from_slice(&field.to_le_bytes());
        }
        end += bytes.len();
    }
    let mut file = Vec::with_capacity(end);
    file.extend_from_slice(&MAGIC);
    file.extend_from_slice(&MAJOR.to_le_bytes());
    file.extend_from_slice(&MINOR.to_le_bytes());
    file.extend_from_slice(&ENDIAN.to_le_bytes());
    file.extend_from_slice(&(sections.len() as u32 + 1).to_le_bytes());
    file.extend_from_slice(&(end as u64).to_le_bytes());
    let header_hash = hash_header(&file, &table);
    file.extend_from_slice(&header_hash.to_le_bytes());
    file.extend_from_slice(&table);
    for (_, bytes) in all {
        file.resize(file.len().next_multiple_of(ALIGN), 0);
        file.extend_from_slice(bytes);
    }
    file
}

/// Checks everything, then copies.
pub(super) fn from_bytes(file: &[u8]) -> Result<Content> {
    let sections = read_sections(file)?;
    let section = |tag: &[u8; 4]| {
        let found = sections.iter().find(|(name, _)| name == tag).map(|(_, bytes)| *bytes);
        found.ok_or_else(|| VectorError::format(format!("section {} is missing", String::from_utf8_lossy(tag))))
    };
    let (config, centred, next_id, n_rows) = read_meta(section(b"META")?)?;
    let sized = |tag: &[u8; 4], width: usize, n: usize| {
        let bytes = section(tag)?;
        if Some(bytes.len()) == n.checked_mul(width) {
            return Ok(bytes);
        }
        let name = String::from_utf8_lossy(tag);
        Err(VectorError::format(format!("section {name} has {} bytes for {n} entries of {width}", bytes.len())))
    };
    let mean = read_f32(sized(b"MEAN", 4, config.dim)?, "MEAN")?;
    let (blocks, _) = sized(b"IDS_", 8, n_rows)?.as_chunks::<8>();
    let ids: Vec<i64> = blocks.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let norms = match config.metric {
        Metric::Cosine => read_f32(sized(b"NORM", 4, n_rows)?, "NORM")?,
        _ => Vec::new(),
    };
    if norms.iter().any(|&norm| !(0.0..=MAX_NORM as f32).contains(&norm)) {
        return Err(VectorError::format("section NORM holds a norm outside 0..=1e18"));
    }
    let keys = sized(b"KEYS", config.dim * config.dtype.size(), n_rows)?.to_vec();
    let mut sorted = ids.clone();
    sorted.sort_unstable();
    if sorted.first().is_some_and(|&id| id < 0) || sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(VectorError::format("ids are negative or repeated"));
    }
    if next_id > 1 << 63 || sorted.last().is_some_and(|&id| id as u64 >= next_id) {
        return Err(VectorError::format("the next id is out of range or taken"));
    }
    Ok(Content { config, centred, next_id, mean, ids, norms, keys })
}

fn meta_bytes(content: &Content) -> Vec<u8> {
    let config = &content.config;
    let mut bytes = Vec::with_capacity(META_BYTES);
    bytes.extend_from_slice(&(config.dim as u32).to_le_bytes());
    bytes.extend_from_slice(&[config.metric as u8, dtype_code(config.dtype), u8::from(config.center)]);
    bytes.push(u8::from(content.centred));
    bytes.extend_from_slice(&config.seed.to_le_bytes());
    bytes.extend_from_slice(&(content.ids.len() as u64).to_le_bytes());
    bytes.extend_from_slice(&content.next_id.to_le_bytes());
    bytes.resize(META_BYTES, 0);
    bytes
}

fn read_meta(bytes: &[u8]) -> Result<(VectorConfig, bool, u64, usize)> {
    if bytes.len() < META_BYTES {
        return Err(VectorError::format("section META is too short"));
    }
    let metrics = [Metric::InnerProduct, Metric::SquaredL2, Metric::Cosine];
    let metric = metrics.into_iter().find(|metric| *metric as u8 == bytes[4]);
    let dtype = [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|dtype| dtype_code(*dtype) == bytes[5]);
    let (Some(metric), Some(dtype), true) = (metric, dtype, bytes[6] <= 1 && bytes[7] <= 1) else {
        return Err(VectorError::format("section META names an unknown metric, dtype or flag"));
    };
    let config =
        VectorConfig { dim: u32_at(bytes, 0) as usize, metric, dtype, center: bytes[6] == 1, seed: u64_at(bytes, 8) };
    config.check().map_err(|error| VectorError::format(error.to_string()))?;
    let n_rows = usize::try_from(u64_at(bytes, 16)).map_err(|_| VectorError::format("too many rows"))?;
    Ok((config, bytes[7] == 1, u64_at(bytes, 24), n_rows))
}

fn dtype_code(dtype: Dtype) -> u8 {
    match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Bf16 => 2,
    }
}

/// The sections, after all bounds and hashes were checked.
fn read_sections(file: &[u8]) -> Result<Vec<([u8; 4], &[u8])>> {
    if file.len() < HEADER || file[..4] != MAGIC {
        return Err(VectorError::format("it does not start with the mark of an index"));
    }
    let major = u16::from_le_bytes([file[4], file[5]]);
    if major != MAJOR {
        return Err(VectorError::format(format!("version {major}, this release reads version {MAJOR}")));
    }
    if u32_at(file, 8) != ENDIAN {
        return Err(VectorError::format("the byte order mark is wrong"));
    }
    let n_sections = u32_at(file, 12) as usize;
    if n_sections > MAX_SECTIONS {
        return Err(VectorError::format(format!("{n_sections} sections")));
    }
    if u64_at(file, 16) != file.len() as u64 {
        return Err(VectorError::format(format!("{} bytes, the header says {}", file.len(), u64_at(file, 16))));
    }
    let table_end = HEADER + n_sections * ENTRY;
    let table = file.get(HEADER..table_end).ok_or_else(|| VectorError::format("the section table is cut short"))?;
    if hash_header(&file[..24], table) != u64_at(file, 24) {
        return Err(VectorError::format("the header's checksum is wrong"));
    }
    let mut sections = Vec::with_capacity(n_sections);
    let mut end = table_end;
    for entry in table.chunks_exact(ENTRY) {
        let tag = [entry[0], entry[1], entry[2], entry[3]];
        let name = String::from_utf8_lossy(&tag).into_owned();
        let bounds = usize::try_from(u64_at(entry, 8)).ok().zip(usize::try_from(u64_at(entry, 16)).ok());
        let range = bounds.and_then(|(start, length)| Some(start..start.checked_add(length)?));
        let bytes = range.clone().and_then(|range| file.get(range));
        let (Some(range), Some(bytes)) = (range, bytes) else {
            return Err(VectorError::format(format!("section {name} lies outside the file")));
        };
        if range.start < end || file[end..range.start].iter().any(|&byte| byte != 0) {
            return Err(VectorError::format(format!("bytes before section {name} are not zero")));
        }
        if xxh3_64(bytes) != u64_at(entry, 24) {
            return Err(VectorError::format(format!("the checksum of section {name} is wrong")));
        }
        end = range.end;
        sections.push((tag, bytes));
    }
    if end != file.len() {
        return Err(VectorError::format("bytes follow the last section"));
    }
    Ok(sections)
}

fn read_f32(bytes: &[u8], name: &str) -> Result<Vec<f32>> {
    let (blocks, _) = bytes.as_chunks::<4>();
    let values: Vec<f32> = blocks.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    if values.iter().all(|value| value.is_finite()) {
        return Ok(values);
    }
    Err(VectorError::format(format!("section {name} holds a NaN or an infinity")))
}

fn hash_header(header: &[u8], table: &[u8]) -> u64 {
    xxh3_64(&[header, table].concat())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
