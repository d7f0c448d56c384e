//! Files whose checksums are right and whose content is not.

use std::collections::BTreeMap;

use icecache_core::Dtype;
use icecache_core::vector::{Metric, OnConflict, VectorConfig, VectorError, VectorIndex};
use xxhash_rust::xxh3::xxh3_64;

use crate::vector::{add, get, pool};

const HEADER: usize = 32;
const ENTRY: usize = 32;

type Sections = BTreeMap<[u8; 4], Vec<u8>>;

fn file() -> Vec<u8> {
    let config = VectorConfig { dim: 12, metric: Metric::Cosine, dtype: Dtype::F16, center: true, seed: 7 };
    let index = VectorIndex::new(config).unwrap();
    let ids: Vec<i64> = (0..40).map(|i| i * 3 + 5).collect();
    let rows: Vec<f32> = (0..40 * 12).map(|i| (i as f32 * 0.7).sin()).collect();
    add(&index, &pool(1), Some(&ids), &rows, OnConflict::Error).unwrap();
    index.to_bytes()
}

fn u64_at(file: &[u8], at: usize) -> usize {
    u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize
}

fn sections(file: &[u8]) -> Sections {
    let n = u32::from_le_bytes(file[12..16].try_into().unwrap()) as usize;
    let entry = |i: usize| HEADER + ENTRY * i;
    let tag = |at: usize| <[u8; 4]>::try_from(&file[at..at + 4]).unwrap();
    let bytes = |at: usize| file[u64_at(file, at + 8)..][..u64_at(file, at + 16)].to_vec();
    (0..n).map(entry).map(|at| (tag(at), bytes(at))).collect()
}

fn assemble(sections: &Sections) -> Vec<u8> {
    let mut table = Vec::new();
    let mut body = Vec::new();
    let start = HEADER + ENTRY * sections.len();
    for (tag, bytes) in sections {
        body.resize((start + body.len()).next_multiple_of(64) - start, 0);
        table.extend_from_slice(tag);
        table.extend_from_slice(&[0; 4]);
        for field in [(start + body.len()) as u64, bytes.len() as u64, xxh3_64(bytes)] {
            table.extend_from_slice(&field.to_le_bytes());
        }
        body.extend_from_slice(bytes);
    }
    let mut file = file()[..12].to_vec();
    file.extend_from_slice(&(sections.len() as u32).to_le_bytes());
    file.extend_from_slice(&((start + body.len()) as u64).to_le_bytes());
    sign(&mut file, &table);
    [file, table, body].concat()
}

fn sign(header: &mut Vec<u8>, table: &[u8]) {
    header.truncate(24);
    let hash = xxh3_64(&[header, table].concat());
    header.extend_from_slice(&hash.to_le_bytes());
}

fn refusal(file: &[u8]) -> String {
    match VectorIndex::from_bytes(&pool(1), file) {
        Err(VectorError::Format(problem)) => problem,
        Err(other) => panic!("expected a format error, got {other}"),
        Ok(_) => panic!("the file was accepted"),
    }
}

fn forged(change: impl Fn(&mut Sections)) -> Vec<u8> {
    let mut content = sections(&file());
    change(&mut content);
    assemble(&content)
}

fn put(tag: [u8; 4], at: usize, bytes: &[u8]) -> Vec<u8> {
    forged(|content| content.get_mut(&tag).unwrap()[at..at + bytes.len()].copy_from_slice(bytes))
}

#[test]
fn a_file_put_together_by_hand_is_readable() {
    let index = VectorIndex::from_bytes(&pool(1), &forged(|_| {})).unwrap();
    assert_eq!(index.to_bytes(), file());
}

#[test]
fn an_unknown_section_is_skipped() {
    let with_more = forged(|content| {
        content.insert(*b"NEW_", vec![1; 100]);
    });
    assert_eq!(VectorIndex::from_bytes(&pool(1), &with_more).unwrap().len(), 40);
}

#[test]
fn hostile_fields_are_refused_by_name() {
    let huge = u64::MAX.to_le_bytes();
    let cases: [(Vec<u8>, &str); 17] = [
        (put(*b"META", 0, &[0; 4]), "dim"),
        (put(*b"META", 0, &[255; 4]), "dim"),
        (put(*b"META", 0, &[13, 0, 0, 0]), "MEAN"),
        (put(*b"META", 4, &[9]), "metric"),
        (put(*b"META", 5, &[9]), "dtype"),
        (put(*b"META", 6, &[2]), "flag"),
        (put(*b"META", 16, &huge), "IDS_"),
        (put(*b"META", 16, &(1u64 << 61).to_le_bytes()), "IDS_"),
        (put(*b"META", 24, &[0; 8]), "next id"),
        (put(*b"META", 24, &huge), "next id"),
        (put(*b"IDS_", 8, &(-1i64).to_le_bytes()), "ids"),
        (put(*b"IDS_", 8, &5i64.to_le_bytes()), "ids"),
        (put(*b"MEAN", 0, &f32::NAN.to_le_bytes()), "MEAN"),
        (put(*b"MEAN", 0, &3e38f32.to_le_bytes()), "norm"),
        (put(*b"NORM", 0, &f32::INFINITY.to_le_bytes()), "NORM"),
        (put(*b"NORM", 0, &(-1f32).to_le_bytes()), "NORM"),
        (put(*b"KEYS", 0, &[0, 0x7e]), "NaN"),
    ];
    for (file, name) in cases {
        let problem = refusal(&file);
        assert!(problem.contains(name), "{name}: {problem}");
    }
}

#[test]
fn missing_and_misfit_sections_are_refused_by_name() {
    for tag in [b"META", b"MEAN", b"IDS_", b"NORM", b"KEYS"] {
        let name = String::from_utf8_lossy(tag).into_owned();
        let without = forged(|content| {
            content.remove(tag);
        });
        assert!(refusal(&without).contains(&name));
        let shorter = forged(|content| content.get_mut(tag).unwrap().truncate(10));
        assert!(refusal(&shorter).contains(&name));
    }
}

#[test]
fn hostile_offsets_are_refused() {
    for (at, value) in [(8, 1 << 63), (8, u64::MAX - 7), (16, u64::MAX), (16, 1 << 40), (8, 0), (8, 33)] {
        let mut file = file();
        let n = sections(&file).len();
        file[HEADER + at..HEADER + at + 8].copy_from_slice(&value.to_le_bytes());
        let table = file[HEADER..HEADER + ENTRY * n].to_vec();
        let mut header = file[..HEADER].to_vec();
        sign(&mut header, &table);
        file[..HEADER].copy_from_slice(&header);
        let problem = refusal(&file);
        assert!(problem.contains("outside") || problem.contains("zero"), "{problem}");
    }
}

#[test]
fn rows_that_grew_longer_by_centring_and_rounding_are_loaded_again() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for metric in [Metric::InnerProduct, Metric::SquaredL2] {
            let index = VectorIndex::new(VectorConfig { dim: 1, metric, dtype, center: true, seed: 0 }).unwrap();
            // The mean is near one end: rows at the other end become almost twice as long as a vector may be.
            let rows: Vec<f32> = (0..1100).map(|i| if i % 20 == 0 { 1e18 } else { -1e18 }).collect();
            add(&index, &pool(1), None, &rows, OnConflict::Error).unwrap();
            let loaded = VectorIndex::from_bytes(&pool(1), &index.to_bytes()).unwrap();
            assert_eq!(get(&loaded, &[0, 1]), get(&index, &[0, 1]), "{dtype:?} {metric:?}");
        }
    }
}
