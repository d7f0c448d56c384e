//! Files whose checksums are right and whose content is not.

use std::sync::Arc;

use icecache_core::Dtype;
use icecache_core::vector::{Effort, Metric, OnConflict, VectorConfig, VectorError, VectorIndex};
use xxhash_rust::xxh3::xxh3_64;

use crate::vector::{add, get, pool};

const HEADER: usize = 32;
const ENTRY: usize = 32;

type Sections = Vec<([u8; 4], Vec<u8>)>;

/// 1500 vectors, one sealed segment and a tail, some removed.
fn file() -> Vec<u8> {
    let config =
        VectorConfig { dim: 12, metric: Metric::Cosine, dtype: Dtype::F16, center: true, seed: 7, codes: true };
    let index = VectorIndex::new(config).unwrap();
    let ids: Vec<i64> = (0..1500).map(|i| i * 3 + 5).collect();
    let rows: Vec<f32> = (0..1500 * 12).map(|i| (i as f32 * 0.7).sin()).collect();
    add(&index, &pool(1), Some(&ids), &rows, OnConflict::Error).unwrap();
    index.remove(&pool(1), &[5, 8, 3 * 1400 + 5], true).unwrap();
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

/// The same answer from both loaders, the second with all checks.
fn refusal(file: &[u8]) -> String {
    let mapping: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(file.to_vec());
    let problem = |outcome: Result<VectorIndex, VectorError>| match outcome {
        Err(VectorError::Format(problem)) => problem,
        Err(other) => panic!("expected a format error, got {other}"),
        Ok(_) => panic!("the file was accepted"),
    };
    problem(VectorIndex::of_mapping(&pool(1), &mapping, true));
    problem(VectorIndex::from_bytes(&pool(1), file))
}

fn of_tag(content: &mut Sections, tag: [u8; 4]) -> &mut Vec<u8> {
    &mut content.iter_mut().find(|(name, _)| *name == tag).unwrap().1
}

fn forged(change: impl Fn(&mut Sections)) -> Vec<u8> {
    let mut content = sections(&file());
    change(&mut content);
    assemble(&content)
}

fn put(tag: [u8; 4], at: usize, bytes: &[u8]) -> Vec<u8> {
    forged(|content| of_tag(content, tag)[at..at + bytes.len()].copy_from_slice(bytes))
}

#[test]
fn a_file_put_together_by_hand_is_readable() {
    let index = VectorIndex::from_bytes(&pool(1), &forged(|_| {})).unwrap();
    index.validate().unwrap();
    assert_eq!(index.to_bytes(), file());
}

#[test]
fn an_unknown_section_is_skipped() {
    let with_more = forged(|content| content.insert(3, (*b"NEW_", vec![1; 100])));
    assert_eq!(VectorIndex::from_bytes(&pool(1), &with_more).unwrap().len(), 1497);
}

/// The same with a sample of three queries and a curve measured with them.
fn calibrated() -> Vec<u8> {
    let index = VectorIndex::from_bytes(&pool(1), &file()).unwrap();
    index.set_sample(&(0..36).map(|i| (i as f32).cos()).collect::<Vec<f32>>()).unwrap();
    index.calibrate(None, 10).unwrap();
    index.to_bytes()
}

#[test]
fn what_was_measured_for_a_recall_is_read_again() {
    let index = VectorIndex::from_bytes(&pool(1), &calibrated()).unwrap();
    assert_eq!(index.to_bytes(), calibrated());
    let content = sections(&calibrated());
    assert_eq!(content.len(), sections(&file()).len() + 1);
    assert!(!index.calibrate(None, 10).unwrap().is_empty());
}

#[test]
fn an_index_without_codes_is_read_as_one() {
    let with_option = |bytes: Vec<u8>| forged(|content| content.push((*b"OPTN", bytes.clone())));
    assert!(!VectorIndex::from_bytes(&pool(1), &with_option(vec![0])).unwrap().config().codes);
    assert!(VectorIndex::from_bytes(&pool(1), &file()).unwrap().config().codes);
    for bytes in [vec![], vec![1], vec![0, 0]] {
        assert!(refusal(&with_option(bytes)).contains("OPTN"));
    }
}

#[test]
fn a_hostile_calibration_is_refused_by_name() {
    let put = |at: usize, bytes: &[u8]| {
        let mut content = sections(&calibrated());
        of_tag(&mut content, *b"CALI")[at..at + bytes.len()].copy_from_slice(bytes);
        assemble(&content)
    };
    // Behind the count: 3 queries of 12 numbers, the number of curves, then k, rows, removed, flag, points.
    let (curves, k) = (8 + 36 * 4, 8 + 36 * 4 + 8);
    let cases = [
        put(0, &u64::MAX.to_le_bytes()),
        put(0, &257_u64.to_le_bytes()),
        put(0, &2_u64.to_le_bytes()),
        put(8, &f32::NAN.to_le_bytes()),
        put(8, &3e38_f32.to_le_bytes()),
        put(curves, &u64::MAX.to_le_bytes()),
        put(curves, &0_u64.to_le_bytes()),
        put(curves, &2_u64.to_le_bytes()),
        put(k, &0_u64.to_le_bytes()),
        put(k + 8, &0_u64.to_le_bytes()),
        put(k + 8, &u64::MAX.to_le_bytes()),
        put(k + 24, &2_u32.to_le_bytes()),
        put(k + 28, &0_u32.to_le_bytes()),
        put(k + 28, &u32::MAX.to_le_bytes()),
        put(k + 32, &0_u32.to_le_bytes()),
        put(k + 36, &f32::NAN.to_le_bytes()),
        put(k + 36, &1.5_f32.to_le_bytes()),
        put(k + 40, &(-1_f32).to_le_bytes()),
    ];
    for (case, file) in cases.iter().enumerate() {
        assert!(refusal(file).contains("CALI"), "case {case}: {}", refusal(file));
    }
    let length = of_tag(&mut sections(&calibrated()), *b"CALI").len();
    for end in 0..length {
        let mut content = sections(&calibrated());
        of_tag(&mut content, *b"CALI").truncate(end);
        assert!(refusal(&assemble(&content)).contains("CALI"), "cut at {end}");
    }
}

#[test]
fn a_mapped_file_is_the_index_that_was_saved() {
    let copied = VectorIndex::from_bytes(&pool(1), &file()).unwrap();
    for verify in [false, true] {
        let mapping: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(file());
        let mapped = VectorIndex::of_mapping(&pool(1), &mapping, verify).unwrap();
        mapped.validate().unwrap();
        assert!(mapped.is_read_only());
        assert_eq!(mapped.to_bytes(), file());
        let query: Vec<f32> = (0..12).map(|i| (i as f32).cos()).collect();
        for effort in [Effort::default(), Effort::EXACT] {
            let found = mapped.search(None, &query, 20, effort).unwrap();
            assert_eq!(found, copied.search(None, &query, 20, effort).unwrap());
        }
        assert!(matches!(mapped.remove(&pool(1), &[5], false), Err(VectorError::ReadOnly)));
        let stats = mapped.stats();
        assert!(stats.page_bytes < copied.stats().page_bytes / 2, "{stats:?}");
        // A copy can be written to; it shares the mapped pages until it packs them again.
        let twin = mapped.copy();
        drop(mapped);
        let row: Vec<f32> = (0..12 * 700).map(|i| (i as f32).sin()).collect();
        add(&twin, &pool(1), None, &row, OnConflict::Error).unwrap();
        twin.validate().unwrap();
        twin.compact(&pool(1), None).unwrap();
        twin.validate().unwrap();
        assert_eq!(twin.len(), 1497 + 700);
    }
}

#[test]
fn hostile_fields_are_refused_by_name() {
    let huge = u64::MAX.to_le_bytes();
    let cases: [(Vec<u8>, &str); 31] = [
        (put(*b"META", 0, &[0; 4]), "dim"),
        (put(*b"META", 0, &[255; 4]), "dim"),
        (put(*b"META", 0, &[13, 0, 0, 0]), "MEAN"),
        (put(*b"META", 4, &[9]), "metric"),
        (put(*b"META", 5, &[9]), "dtype"),
        (put(*b"META", 6, &[2]), "flag"),
        (put(*b"META", 16, &huge), "rows"),
        (put(*b"META", 16, &1600u64.to_le_bytes()), "IDS_"),
        (put(*b"META", 16, &1000u64.to_le_bytes()), "segments"),
        (put(*b"META", 24, &[0; 8]), "next id"),
        (put(*b"META", 24, &huge), "next id"),
        (put(*b"META", 40, &huge), "segments"),
        (put(*b"META", 40, &0u64.to_le_bytes()), "SEGS"),
        (put(*b"IDS_", 8 * 20, &(-1i64).to_le_bytes()), "id"),
        (put(*b"IDS_", 8 * 20, &(3 * 21 + 5i64).to_le_bytes()), "IDS_"),
        (put(*b"MEAN", 0, &f32::NAN.to_le_bytes()), "MEAN"),
        (put(*b"MEAN", 0, &3e38f32.to_le_bytes()), "norm"),
        (put(*b"XTRA", 0, &f32::INFINITY.to_le_bytes()), "XTRA"),
        (put(*b"XTRA", 0, &(-1f32).to_le_bytes()), "XTRA"),
        (put(*b"SEGS", 0, &[65]), "SEGS"),
        (put(*b"SEGS", 0, &[63]), "PAGE"),
        (put(*b"PAGE", 0, &[0]), "PAGE"),
        (put(*b"PAGE", 0, &[17]), "PAGE"),
        (put(*b"PAGE", 0, &[7]), "PAGE"),
        (put(*b"PAGE", 4, &f32::NAN.to_le_bytes()), "PAGE"),
        (put(*b"PAGE", 4, &(-1f32).to_le_bytes()), "PAGE"),
        (put(*b"LOCL", 0, &1024u16.to_le_bytes()), "LOCL"),
        (put(*b"LOCL", 2, &[0, 0]), "LOCL"),
        (put(*b"TAIL", 0, &[2]), "TAIL"),
        (put(*b"ROWS", 0, &[0, 0x7e]), "NaN"),
        (put(*b"KEYS", 0, &[0, 0x7e]), "NaN"),
    ];
    for (file, name) in cases {
        let problem = refusal(&file);
        assert!(problem.contains(name), "{name}: {problem}");
    }
}

#[test]
fn wrong_summaries_are_computed_again_and_found_by_a_verified_mapping() {
    for file in [put(*b"LEVL", 5, &[77]), put(*b"PAGE", 8, &1f32.to_le_bytes()), put(*b"GRUP", 20, &[77])] {
        assert_eq!(VectorIndex::from_bytes(&pool(1), &file).unwrap().to_bytes(), self::file());
        let mapping: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(file);
        assert!(matches!(VectorIndex::of_mapping(&pool(1), &mapping, true), Err(VectorError::Format(_))));
        assert!(VectorIndex::of_mapping(&pool(1), &mapping, false).is_ok());
    }
}

#[test]
fn damaged_rows_of_an_unverified_mapping_neither_panic_nor_hang() {
    for byte in [0xff, 0x7c, 0x80] {
        let file = forged(|content| of_tag(content, *b"KEYS").fill(byte));
        let mapping: Arc<dyn AsRef<[u8]> + Send + Sync> = Arc::new(file);
        let index = VectorIndex::of_mapping(&pool(1), &mapping, false).unwrap();
        let query = vec![1.0; 12];
        for effort in [Effort::default(), Effort::EXACT, Effort { beam: Some(3), ..Effort::default() }] {
            index.search(None, &query, 5, effort).unwrap();
            index.range_search(None, &query, 0.5, None, effort).unwrap();
        }
        let recall = Effort { recall: Some(0.9), ..Effort::default() };
        index.search(None, &query, 5, recall).unwrap();
        assert!(index.range_search(None, &query, 0.5, None, recall).is_err());
        index.pages().unwrap();
        get(&index, &[11, 14]);
    }
}

#[test]
fn missing_and_misfit_sections_are_refused_by_name() {
    let tags: Vec<[u8; 4]> = sections(&file()).iter().map(|(tag, _)| *tag).collect();
    assert_eq!(tags.len(), 12);
    for tag in &tags {
        let name = String::from_utf8_lossy(tag).into_owned();
        let without = forged(|content| content.retain(|(other, _)| other != tag));
        assert!(refusal(&without).contains(&name));
        let shorter = forged(|content| {
            of_tag(content, *tag).pop();
        });
        assert!(refusal(&shorter).contains(&name));
    }
    assert!(refusal(&forged(|content| content.push((*b"MEAN", vec![0; 48])))).contains("twice"));
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
        assert!(problem.contains("outside") || problem.contains("follow"), "{problem}");
    }
}

#[test]
fn rows_that_grew_longer_by_centring_and_rounding_are_loaded_again() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for metric in [Metric::InnerProduct, Metric::SquaredL2] {
            let index =
                VectorIndex::new(VectorConfig { dim: 1, metric, dtype, center: true, seed: 0, codes: true }).unwrap();
            // The mean is near one end: rows at the other end become almost twice as long as a vector may be.
            let rows: Vec<f32> = (0..1100).map(|i| if i % 20 == 0 { 1e18 } else { -1e18 }).collect();
            add(&index, &pool(1), None, &rows, OnConflict::Error).unwrap();
            let loaded = VectorIndex::from_bytes(&pool(1), &index.to_bytes()).unwrap();
            assert_eq!(get(&loaded, &[0, 1]), get(&index, &[0, 1]), "{dtype:?} {metric:?}");
        }
    }
}
