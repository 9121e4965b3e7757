//! The header of a GGUF file, read from bytes and checked whole.
//!
//! Every count and length is compared with the bytes that are left before anything is read or
//! stored, all sums are checked 64-bit ones, and what is kept of strings and arrays is where they
//! lie. So a header that lies costs an error, never memory. Format: ggml's `docs/gguf.md`, versions
//! 2 and 3, little-endian. The list of lies comes from the advisories against llama.cpp and vLLM
//! (CVE-2025-53630, CVE-2026-27940, CVE-2026-53923).

use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use super::types::TensorType;

/// A metadata value; text and arrays are ranges of the file's bytes.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Unsigned(u64),
    /// Any signed integer.
    Signed(i64),
    /// A 32- or 64-bit float.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// UTF-8 text.
    Text(Range<usize>),
    /// An array of one element type.
    Array(Array),
}

/// An array in the file; its elements have been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// Type of its elements.
    pub kind: Kind,
    /// Number of its elements.
    pub len: usize,
    /// The bytes of its elements.
    pub bytes: Range<usize>,
}

/// Type of a metadata value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Kind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Text,
    Array,
    U64,
    I64,
    F64,
}

impl Kind {
    fn from_id(id: u32) -> Option<Self> {
        use Kind::{Array, Bool, Text, F32, F64, I16, I32, I64, I8, U16, U32, U64, U8};
        [U8, I8, U16, I16, U32, I32, F32, Bool, Text, Array, U64, I64, F64].get(id as usize).copied()
    }

    /// Bytes of one value; of text and arrays, the least.
    fn min_bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::Text => 8,
            Self::Array => 12,
        }
    }
}

/// Where a tensor lies and what it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its type.
    pub kind: TensorType,
    /// Row-major, outermost dimension first.
    pub shape: Vec<u64>,
    /// First byte in the file.
    pub offset: u64,
    /// Its bytes.
    pub num_bytes: u64,
}

/// Everything before the tensors' data.
#[derive(Debug)]
pub struct Header {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
}

/// Longest key, as the format states.
const MAX_KEY_BYTES: usize = 65_535;
/// Longest tensor name; ggml itself stops at 63.
const MAX_NAME_BYTES: usize = 1_024;
const MAX_DIMS: u32 = 4;
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 16;
/// Key length, type, and at least one byte.
const MIN_PAIR_BYTES: usize = 8 + 4 + 1;
/// Name length, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_BYTES: usize = 8 + 4 + 8 + 4 + 8;

/// A message that names the field, its value and its limit.
type Checked<T> = Result<T, String>;

impl Header {
    /// Reads and checks the header of a whole file.
    pub fn parse(file: &[u8]) -> Checked<Self> {
        let mut cursor = Cursor { file, at: 0 };
        let magic = cursor.take(4, "magic")?;
        if magic != b"GGUF" {
            return Err(format!("magic is {:?}, but must be \"GGUF\"", String::from_utf8_lossy(magic)));
        }
        let version = cursor.u32("version")?;
        if !(2..=3).contains(&version) {
            let hint = if (2..=3).contains(&version.swap_bytes()) { " (the file is big-endian)" } else { "" };
            return Err(format!("version is {version}, but must be 2 or 3, little-endian{hint}"));
        }
        let num_tensors = cursor.u64("tensor_count")?;
        let num_pairs = cursor.count("metadata_kv_count", MIN_PAIR_BYTES)?;
        let metadata = parse_metadata(&mut cursor, num_pairs)?;
        let num_tensors = cursor.fits("tensor_count", num_tensors, MIN_TENSOR_BYTES)?;
        let tensors = parse_tensors(&mut cursor, num_tensors, alignment(&metadata)?)?;
        Ok(Self { metadata, tensors })
    }
}

fn parse_metadata(cursor: &mut Cursor, num_pairs: usize) -> Checked<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for index in 0..num_pairs {
        let key = cursor.text(&format!("key {index}"), MAX_KEY_BYTES)?;
        let key = std::str::from_utf8(&cursor.file[key]).expect("text() checked it").to_owned();
        let kind = cursor.kind(&key)?;
        let value = cursor.value(&key, kind)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("key {key:?} occurs twice"));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Checked<u64> {
    match metadata.get("general.alignment") {
        None => Ok(DEFAULT_ALIGNMENT),
        Some(&Value::Unsigned(value)) if value.is_power_of_two() && value <= MAX_ALIGNMENT => Ok(value),
        Some(Value::Unsigned(value)) => {
            Err(format!("general.alignment is {value}, but must be a power of two up to {MAX_ALIGNMENT}"))
        }
        Some(_) => Err("general.alignment must be an unsigned integer".to_owned()),
    }
}

fn parse_tensors(cursor: &mut Cursor, num_tensors: usize, alignment: u64) -> Checked<Vec<Tensor>> {
    let mut tensors: Vec<Tensor> = Vec::new();
    let mut names = HashSet::new();
    for index in 0..num_tensors {
        let tensor = parse_tensor(cursor, index)?;
        if tensor.offset % alignment != 0 {
            let Tensor { name, offset, .. } = tensor;
            return Err(format!("tensor {name:?}: offset is {offset}, but must be a multiple of {alignment}"));
        }
        if !names.insert(tensor.name.clone()) {
            return Err(format!("tensor {:?} occurs twice", tensor.name));
        }
        tensors.push(tensor);
    }
    // Offsets count from the first aligned byte after the header.
    let data_start = (cursor.at as u64).next_multiple_of(alignment);
    let file_len = cursor.file.len() as u64;
    for tensor in &mut tensors {
        let Tensor { name, offset, num_bytes, .. } = tensor;
        let end = data_start.checked_add(*offset).and_then(|start| start.checked_add(*num_bytes));
        if end.is_none_or(|end| end > file_len) {
            return Err(format!(
                "tensor {name:?}: {num_bytes} bytes at offset {offset} of the data (which starts at byte {data_start}) \
                 end after the file's {file_len} bytes: the file is truncated or its header is wrong"
            ));
        }
        *offset += data_start;
    }
    let mut by_offset: Vec<&Tensor> = tensors.iter().collect();
    by_offset.sort_by_key(|tensor| tensor.offset);
    for pair in by_offset.windows(2) {
        let end = pair[0].offset + pair[0].num_bytes;
        if end > pair[1].offset {
            let (first, second, offset) = (&pair[0].name, &pair[1].name, pair[1].offset);
            return Err(format!(
                "tensor {first:?} ends at byte {end}, inside {second:?}, which starts at byte {offset}"
            ));
        }
    }
    Ok(tensors)
}

/// One tensor's record; `offset` still counts from the start of the data.
fn parse_tensor(cursor: &mut Cursor, index: usize) -> Checked<Tensor> {
    let name = cursor.text(&format!("name of tensor {index}"), MAX_NAME_BYTES)?;
    let name = std::str::from_utf8(&cursor.file[name]).expect("text() checked it").to_owned();
    let field = format!("tensor {name:?}");
    let num_dims = cursor.u32(&field)?;
    if !(1..=MAX_DIMS).contains(&num_dims) {
        return Err(format!("{field}: n_dims is {num_dims}, but must be from 1 to {MAX_DIMS}"));
    }
    let mut shape = Vec::with_capacity(num_dims as usize);
    for _ in 0..num_dims {
        shape.push(cursor.u64(&field)?);
    }
    let kind = cursor.u32(&field)?;
    let kind = TensorType::from_id(kind).ok_or_else(|| format!("{field}: type {kind} is unknown"))?;
    let offset = cursor.u64(&field)?;

    if shape.contains(&0) {
        return Err(format!("{field}: dimensions are {shape:?}, but must all be at least 1"));
    }
    if shape[0] % kind.block_size != 0 {
        let (row, name, block) = (shape[0], kind.name, kind.block_size);
        return Err(format!("{field}: rows have {row} elements, but {name} needs a multiple of {block}"));
    }
    let num_bytes = shape
        .iter()
        .try_fold(1u64, |product, &dim| product.checked_mul(dim))
        .and_then(|elements| (elements / kind.block_size).checked_mul(kind.block_bytes))
        .ok_or_else(|| format!("{field}: dimensions {shape:?} overflow 64 bits"))?;
    shape.reverse(); // ggml names the innermost dimension first
    Ok(Tensor { name, kind, shape, offset, num_bytes })
}

/// Reads forward through the file; every read is checked against its end.
struct Cursor<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.file.len() - self.at
    }

    fn take(&mut self, len: usize, field: &str) -> Checked<&'a [u8]> {
        if len > self.left() {
            let (at, left) = (self.at, self.left());
            return Err(format!("{field}: needs {len} bytes at byte {at}, but the file has only {left} more"));
        }
        let bytes = &self.file[self.at..self.at + len];
        self.at += len;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self, field: &str) -> Checked<[u8; N]> {
        Ok(self.take(N, field)?.try_into().expect("take() gives as many bytes as asked"))
    }

    fn u32(&mut self, field: &str) -> Checked<u32> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn u64(&mut self, field: &str) -> Checked<u64> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    /// Checks that `count` things of at least `min_bytes` each can still follow.
    fn fits(&self, field: &str, count: u64, min_bytes: usize) -> Checked<usize> {
        let limit = self.left() / min_bytes;
        match usize::try_from(count) {
            Ok(count) if count <= limit => Ok(count),
            _ => Err(format!("{field} is {count}, but the {} bytes left hold at most {limit}", self.left())),
        }
    }

    fn count(&mut self, field: &str, min_bytes: usize) -> Checked<usize> {
        let count = self.u64(field)?;
        self.fits(field, count, min_bytes)
    }

    fn kind(&mut self, field: &str) -> Checked<Kind> {
        let id = self.u32(field)?;
        Kind::from_id(id).ok_or_else(|| format!("{field}: value type is {id}, but must be from 0 to 12"))
    }

    /// Where a text of at most `limit` bytes lies.
    fn text(&mut self, field: &str, limit: usize) -> Checked<Range<usize>> {
        let len = self.count(field, 1)?;
        if len > limit {
            return Err(format!("{field}: has {len} bytes, but must have at most {limit}"));
        }
        let start = self.at;
        std::str::from_utf8(self.take(len, field)?).map_err(|error| format!("{field}: is not UTF-8: {error}"))?;
        Ok(start..self.at)
    }

    fn value(&mut self, key: &str, kind: Kind) -> Checked<Value> {
        Ok(match kind {
            Kind::U8 => Value::Unsigned(self.array::<1>(key)?[0].into()),
            Kind::I8 => Value::Signed(i8::from_le_bytes(self.array(key)?).into()),
            Kind::U16 => Value::Unsigned(u16::from_le_bytes(self.array(key)?).into()),
            Kind::I16 => Value::Signed(i16::from_le_bytes(self.array(key)?).into()),
            Kind::U32 => Value::Unsigned(self.u32(key)?.into()),
            Kind::I32 => Value::Signed(i32::from_le_bytes(self.array(key)?).into()),
            Kind::U64 => Value::Unsigned(self.u64(key)?),
            Kind::I64 => Value::Signed(i64::from_le_bytes(self.array(key)?)),
            Kind::F32 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            Kind::F64 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            Kind::Bool => match self.array::<1>(key)?[0] {
                byte @ 0..=1 => Value::Bool(byte == 1),
                byte => return Err(format!("{key}: boolean is {byte}, but must be 0 or 1")),
            },
            Kind::Text => Value::Text(self.text(key, usize::MAX)?),
            Kind::Array => Value::Array(self.elements(key)?),
        })
    }

    fn elements(&mut self, key: &str) -> Checked<Array> {
        let kind = self.kind(key)?;
        if kind == Kind::Array {
            return Err(format!("{key}: is an array of arrays, which is not supported"));
        }
        let len = self.count(key, kind.min_bytes())?;
        let start = self.at;
        match kind {
            Kind::Text => {
                for _ in 0..len {
                    self.text(key, usize::MAX)?;
                }
            }
            Kind::Bool => {
                if let Some(byte) = self.take(len, key)?.iter().find(|&&byte| byte > 1) {
                    return Err(format!("{key}: boolean is {byte}, but must be 0 or 1"));
                }
            }
            _ => {
                self.take(len * kind.min_bytes(), key)?;
            }
        }
        Ok(Array { kind, len, bytes: start..self.at })
    }
}
