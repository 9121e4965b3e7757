//! GGUF files: metadata, and where each tensor's bytes are.
//!
//! A file is mapped into memory and its header checked whole when it is opened; afterwards reading
//! cannot fail but for keys that are missing or of another type. Knows nothing of models: which
//! keys must be there and what they may hold is the loader's business, dequantising is done in
//! torch.

mod parse;
mod types;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Mmap, MmapMut};

pub use parse::{Array, Kind, Tensor, Value};
pub use types::{TensorType, SUPPORTED};

use crate::error::{Error, Result};
use parse::Header;

/// An open GGUF file.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    bytes: Arc<Mmap>,
    header: Header,
}

impl GgufFile {
    /// Maps the file and checks its header whole.
    ///
    /// # Errors
    /// [`Error::Gguf`] names the file, the field, its value and its limit.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| in_file(path, error))?;
        // SAFETY: the mapping is read-only and only bytes are read from it. Whoever truncates a
        // model file that is in use ends this process with SIGBUS, as with every engine that maps
        // its weights.
        #[allow(unsafe_code)]
        let bytes = unsafe { Mmap::map(&file) }.map_err(|error| in_file(path, error))?;
        Self::checked(path, bytes)
    }

    /// Copies a file's bytes and checks its header whole; errors call it by `path`. For fuzzing,
    /// which has no files.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn parse(path: &Path, file: &[u8]) -> Result<Self> {
        let mut bytes = MmapMut::map_anon(file.len()).map_err(|error| in_file(path, error))?;
        bytes.copy_from_slice(file);
        Self::checked(path, bytes.make_read_only().map_err(|error| in_file(path, error))?)
    }

    fn checked(path: &Path, bytes: Mmap) -> Result<Self> {
        let header = Header::parse(&bytes).map_err(|message| in_file(path, message))?;
        Ok(Self { path: path.to_owned(), bytes: Arc::new(bytes), header })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All metadata keys with their values, in order of the keys.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.header.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// All tensors, in the file's order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.header.tensors
    }

    /// Checks that every tensor can be loaded.
    ///
    /// # Errors
    /// Names the first tensor of a type that cannot, and the types that can.
    pub fn check_types(&self) -> Result<()> {
        let Some(tensor) = self.tensors().iter().find(|tensor| !tensor.kind.is_supported()) else { return Ok(()) };
        let others = self.tensors().iter().filter(|tensor| !tensor.kind.is_supported()).count() - 1;
        Err(self.error(format!(
            "tensor {:?} (and {others} more) has type {}, but supported are {}",
            tensor.name,
            tensor.kind.name,
            SUPPORTED.join(", ")
        )))
    }

    /// The bytes of one tensor.
    pub fn tensor_bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.bytes[tensor.offset as usize..(tensor.offset + tensor.num_bytes) as usize]
    }

    /// The file's bytes, for whoever keeps them longer than this.
    pub fn shared_bytes(&self) -> Arc<Mmap> {
        Arc::clone(&self.bytes)
    }

    /// Text of a metadata value.
    pub fn text(&self, range: &std::ops::Range<usize>) -> &str {
        std::str::from_utf8(&self.bytes[range.clone()]).expect("checked when the file was opened")
    }

    /// Texts of an array of texts.
    pub fn texts<'a>(&'a self, array: &Array) -> impl Iterator<Item = &'a str> {
        let mut bytes = &self.bytes[array.bytes.clone()];
        (0..array.len).map(move |_| {
            let (len, rest) = bytes.split_first_chunk::<8>().expect("checked when the file was opened");
            let (text, rest) = rest.split_at(u64::from_le_bytes(*len) as usize);
            bytes = rest;
            std::str::from_utf8(text).expect("checked when the file was opened")
        })
    }

    /// The elements of an array of numbers or booleans.
    pub fn scalars<'a>(&'a self, array: &Array) -> impl Iterator<Item = Value> + 'a {
        let kind = array.kind;
        let width = array.bytes.len().checked_div(array.len).unwrap_or(1);
        self.bytes[array.bytes.clone()].chunks_exact(width).map(move |bytes| {
            // Little-endian with the sign carried on to 8 bytes.
            let signed = matches!(kind, Kind::I8 | Kind::I16 | Kind::I32 | Kind::I64);
            let fill = if signed && bytes[bytes.len() - 1] >= 0x80 { 0xFF } else { 0 };
            let mut wide = [fill; 8];
            wide[..bytes.len()].copy_from_slice(bytes);
            match kind {
                Kind::F32 => Value::Float(f32::from_bits(u64::from_le_bytes(wide) as u32).into()),
                Kind::F64 => Value::Float(f64::from_le_bytes(wide)),
                Kind::Bool => Value::Bool(wide[0] == 1),
                _ if signed => Value::Signed(i64::from_le_bytes(wide)),
                _ => Value::Unsigned(u64::from_le_bytes(wide)),
            }
        })
    }

    /// The text under `key`, if the key is there.
    ///
    /// # Errors
    /// The value is not text.
    pub fn get_text(&self, key: &str) -> Result<Option<&str>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Text(range)) => Ok(Some(self.text(range))),
            Some(_) => Err(self.error(format!("{key} must be text"))),
        }
    }

    /// The boolean under `key`, if the key is there.
    ///
    /// # Errors
    /// The value is not a boolean.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(&Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(self.error(format!("{key} must be a boolean"))),
        }
    }

    /// The integer under `key`, if the key is there.
    ///
    /// # Errors
    /// The value is not an integer from 0 to 2³² - 1.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        let value = match self.header.metadata.get(key) {
            None => return Ok(None),
            Some(&Value::Unsigned(value)) => u32::try_from(value).ok(),
            Some(&Value::Signed(value)) => u32::try_from(value).ok(),
            Some(_) => None,
        };
        value.map(Some).ok_or_else(|| self.error(format!("{key} must be an integer from 0 to {}", u32::MAX)))
    }

    /// The array under `key`, if the key is there.
    ///
    /// # Errors
    /// The value is not an array of one of these kinds.
    pub fn get_array(&self, key: &str, kinds: &[Kind]) -> Result<Option<&Array>> {
        match self.header.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(array)) if kinds.contains(&array.kind) => Ok(Some(array)),
            Some(_) => Err(self.error(format!("{key} must be an array of {kinds:?}"))),
        }
    }

    /// An error about this file.
    pub(crate) fn error(&self, message: impl std::fmt::Display) -> Error {
        in_file(&self.path, message)
    }
}

fn in_file(path: &Path, message: impl std::fmt::Display) -> Error {
    Error::Gguf(format!("{}: {message}", path.display()))
}

#[cfg(test)]
mod tests;
