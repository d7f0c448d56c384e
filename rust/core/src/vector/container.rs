//! The container of an index file, version 2, little-endian: sections with checksums.
//!
//! ```text
//! 0   magic "ICEX" | u16 major | u16 minor | u32 0x01020304 | u32 number of sections
//! 16  u64 bytes in all | u64 xxh3 of the first 24 bytes and the section table
//! 32  section table: { u32 tag, u32 zero, u64 offset, u64 bytes, u64 xxh3 } each
//! ..  sections in the order of the table, each at a multiple of 64; the gaps are zero
//! ```
//! Unknown tags are skipped (a newer minor version may bring some); another major version is refused. Every byte is
//! covered by a hash or must be zero.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::ops::Range;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use super::error::{Result, VectorError};

const MAGIC: [u8; 4] = *b"ICEX";
const MAJOR: u16 = 2;
const MINOR: u16 = 1;
const ENDIAN: u32 = 0x0102_0304;
const HEADER: usize = 32;
const ENTRY: usize = 32;
const ALIGN: usize = 64;
/// More sections than any version will have; bounds what a hostile header makes us read.
const MAX_SECTIONS: usize = 64;

/// Name of a section.
pub(super) type Tag = [u8; 4];

/// Gives the bytes of a section piece by piece, the same ones each time it is called.
pub(super) type Produce<'a> = Box<dyn Fn(&mut dyn FnMut(&[u8])) + 'a>;

/// Writes the sections; each is produced twice, so that no copy of the whole file is made.
pub(super) fn write(sections: &[(Tag, Produce<'_>)], out: &mut dyn Write) -> io::Result<()> {
    let mut table = Vec::with_capacity(ENTRY * sections.len());
    let mut end = HEADER + ENTRY * sections.len();
    for (tag, produce) in sections {
        let (mut hash, mut length) = (Xxh3::new(), 0);
        produce(&mut |bytes| {
            hash.update(bytes);
            length += bytes.len();
        });
        end = end.next_multiple_of(ALIGN);
        table.extend_from_slice(tag);
        table.extend_from_slice(&[0; 4]);
        for field in [end as u64, length as u64, hash.digest()] {
            table.extend_from_slice(&field.to_le_bytes());
        }
        end += length;
    }
    let mut header = Vec::with_capacity(HEADER);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&MAJOR.to_le_bytes());
    header.extend_from_slice(&MINOR.to_le_bytes());
    header.extend_from_slice(&ENDIAN.to_le_bytes());
    header.extend_from_slice(&(sections.len() as u32).to_le_bytes());
    header.extend_from_slice(&(end as u64).to_le_bytes());
    let hash = hash_header(&header, &table);
    header.extend_from_slice(&hash.to_le_bytes());
    out.write_all(&header)?;
    out.write_all(&table)?;
    let mut at = HEADER + table.len();
    for (_, produce) in sections {
        let start = at.next_multiple_of(ALIGN);
        out.write_all(&[0; ALIGN][..start - at])?;
        at = start;
        let mut outcome = Ok(());
        produce(&mut |bytes| {
            at += bytes.len();
            if outcome.is_ok() {
                outcome = out.write_all(bytes);
            }
        });
        outcome?;
    }
    Ok(())
}

/// The sections of a file: where they are, and what they hold.
pub(super) struct Sections<'a> {
    file: &'a [u8],
    ranges: BTreeMap<Tag, Range<usize>>,
}

impl<'a> Sections<'a> {
    /// Checks header, table, bounds and gaps, and the hash of every section but the one called `unread`.
    pub(super) fn read(file: &'a [u8], unread: Option<Tag>) -> Result<Self> {
        let table = checked_table(file)?;
        let mut ranges = BTreeMap::new();
        let mut end = HEADER + table.len();
        for entry in table.chunks_exact(ENTRY) {
            let tag = [entry[0], entry[1], entry[2], entry[3]];
            let name = name(tag);
            let bounds = usize::try_from(u64_at(entry, 8)).ok().zip(usize::try_from(u64_at(entry, 16)).ok());
            let range = bounds.and_then(|(start, length)| Some(start..start.checked_add(length)?));
            let bytes = range.clone().and_then(|range| file.get(range));
            let (Some(range), Some(bytes)) = (range, bytes) else {
                return Err(VectorError::format(format!("section {name} lies outside the file")));
            };
            if range.start < end || range.start >= end + ALIGN || !range.start.is_multiple_of(ALIGN) {
                return Err(VectorError::format(format!("section {name} does not follow the one before it")));
            }
            if file[end..range.start].iter().any(|&byte| byte != 0) || entry[4..8] != [0; 4] {
                return Err(VectorError::format(format!("bytes before section {name} are not zero")));
            }
            if unread != Some(tag) && xxh3_64(bytes) != u64_at(entry, 24) {
                return Err(VectorError::format(format!("the checksum of section {name} is wrong")));
            }
            end = range.end;
            if ranges.insert(tag, range).is_some() {
                return Err(VectorError::format(format!("section {name} comes twice")));
            }
        }
        if end != file.len() {
            return Err(VectorError::format("bytes follow the last section"));
        }
        Ok(Self { file, ranges })
    }

    /// Where a section is; its length is `n * width`.
    pub(super) fn range(&self, tag: Tag, n: usize, width: usize) -> Result<Range<usize>> {
        let Some(range) = self.ranges.get(&tag) else {
            return Err(VectorError::format(format!("section {} is missing", name(tag))));
        };
        if n.checked_mul(width) == Some(range.len()) {
            return Ok(range.clone());
        }
        let problem = format!("section {} has {} bytes for {n} entries of {width}", name(tag), range.len());
        Err(VectorError::format(problem))
    }

    /// The bytes of a section of any length, if there is one.
    pub(super) fn optional(&self, tag: Tag) -> Option<&'a [u8]> {
        Some(&self.file[self.ranges.get(&tag)?.clone()])
    }

    /// The bytes of a section of `n * width` bytes.
    pub(super) fn bytes(&self, tag: Tag, n: usize, width: usize) -> Result<&'a [u8]> {
        Ok(&self.file[self.range(tag, n, width)?])
    }
}

/// The section table, after the header was checked.
fn checked_table(file: &[u8]) -> Result<&[u8]> {
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
    let table = file.get(HEADER..HEADER + n_sections * ENTRY);
    let table = table.ok_or_else(|| VectorError::format("the section table is cut short"))?;
    if hash_header(&file[..24], table) != u64_at(file, 24) {
        return Err(VectorError::format("the header's checksum is wrong"));
    }
    Ok(table)
}

fn name(tag: Tag) -> String {
    String::from_utf8_lossy(&tag).into_owned()
}

fn hash_header(header: &[u8], table: &[u8]) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(header);
    hash.update(table);
    hash.digest()
}

/// Little-endian number at a place that exists.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..].first_chunk::<4>().map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// Little-endian number at a place that exists.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..].first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
