//! Tensor types of ggml: name, block size and bytes a block, as in ggml's `type_traits` table
//! (gguf-py's `GGML_QUANT_SIZES`). Types that are not listed were never released or have been
//! removed.

/// A tensor type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorType {
    /// Its number in the file.
    pub id: u32,
    /// ggml's name.
    pub name: &'static str,
    /// Elements of one block; rows are whole numbers of blocks.
    pub block_size: u64,
    /// Bytes of one block.
    pub block_bytes: u64,
}

/// Types whose tensors can be loaded.
pub const SUPPORTED: [&str; 14] =
    ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

impl TensorType {
    /// The type with this number.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|entry| entry.0 == id).map(|&(id, name, block_size, block_bytes)| Self {
            id,
            name,
            block_size,
            block_bytes,
        })
    }

    /// Whether tensors of this type can be loaded.
    pub fn is_supported(self) -> bool {
        SUPPORTED.contains(&self.name)
    }
}

/// (id, name, elements of a block, bytes of a block)
const TYPES: [(u32, &str, u64, u64); 34] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 40),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];
