//! Lies and cuts in a small file built here: always an error or a sound header, never a panic.

use super::parse::{Header, Value};
use proptest::prelude::*;

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// Two metadata pairs (a number, an array of texts) and two tensors (`F32` of 2 x 8, `Q8_0` of 32).
fn small_file() -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend(2u64.to_le_bytes()); // tensors
    out.extend(3u64.to_le_bytes()); // pairs
    text(&mut out, "general.alignment");
    out.extend(4u32.to_le_bytes());
    out.extend(32u32.to_le_bytes());
    text(&mut out, "names");
    out.extend(9u32.to_le_bytes());
    out.extend(8u32.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    text(&mut out, "é");
    text(&mut out, "");
    text(&mut out, "flag");
    out.extend(7u32.to_le_bytes());
    out.push(1);
    text(&mut out, "a.weight");
    out.extend(2u32.to_le_bytes());
    out.extend(8u64.to_le_bytes());
    out.extend(2u64.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend(0u64.to_le_bytes());
    text(&mut out, "b.weight");
    out.extend(1u32.to_le_bytes());
    out.extend(32u64.to_le_bytes());
    out.extend(8u32.to_le_bytes());
    out.extend(64u64.to_le_bytes());
    out.resize(out.len().next_multiple_of(32) + 64 + 34, 7);
    out
}

/// Every range a header names lies inside the file.
fn assert_sound(header: &Header, file: &[u8]) {
    for tensor in &header.tensors {
        assert!(tensor.offset + tensor.num_bytes <= file.len() as u64);
    }
    for value in header.metadata.values() {
        match value {
            Value::Text(range) => assert!(std::str::from_utf8(&file[range.clone()]).is_ok()),
            Value::Array(array) => assert!(file.get(array.bytes.clone()).is_some()),
            _ => {}
        }
    }
}

#[test]
fn reads_the_small_file() {
    let file = small_file();
    let header = Header::parse(&file).unwrap();
    let shapes: Vec<_> = header.tensors.iter().map(|t| (t.name.as_str(), t.kind.name, t.shape.clone())).collect();
    assert_eq!(shapes, [("a.weight", "F32", vec![2, 8]), ("b.weight", "Q8_0", vec![32])]);
    let last = &header.tensors[1];
    assert_eq!(last.offset + last.num_bytes, file.len() as u64);
    assert_eq!(header.metadata["general.alignment"], Value::Unsigned(32));
    assert_eq!(header.metadata["flag"], Value::Bool(true));
}

#[test]
fn every_cut_is_an_error() {
    let file = small_file();
    for len in 0..file.len() {
        assert!(Header::parse(&file[..len]).is_err(), "cut at {len}");
    }
}

#[test]
fn every_flipped_bit_is_an_error_or_sound() {
    let file = small_file();
    for bit in 0..file.len() * 8 {
        let mut broken = file.clone();
        broken[bit / 8] ^= 1 << (bit % 8);
        if let Ok(header) = Header::parse(&broken) {
            assert_sound(&header, &broken);
        }
    }
}

#[test]
fn every_word_of_ones_is_an_error_or_sound() {
    let file = small_file();
    for at in 0..file.len() - 8 {
        let mut broken = file.clone();
        broken[at..at + 8].fill(0xFF);
        if let Ok(header) = Header::parse(&broken) {
            assert_sound(&header, &broken);
        }
    }
}

proptest! {
    #[test]
    fn overwritten_bytes_are_an_error_or_sound(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut broken = small_file();
        for (index, byte) in edits {
            let at = index.index(broken.len());
            broken[at] = byte;
        }
        if let Ok(header) = Header::parse(&broken) {
            assert_sound(&header, &broken);
        }
    }
}
