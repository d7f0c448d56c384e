//! Element types and the shape of a page.
#![forbid(unsafe_code)]

use crate::config::PAGE_TOKENS;
use crate::error::{Error, Result};
use crate::simd::signs;

/// Element type of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of binary32.
    Bf16,
    /// A signed byte in units of the row's own scale, a binary32 behind its elements. Keys only.
    I8,
}

impl Dtype {
    /// Bytes of one element.
    #[must_use]
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::I8 => 1,
        }
    }

    /// Bytes of a row of `dim` elements.
    #[must_use]
    pub fn row_bytes(self, dim: usize) -> usize {
        dim * self.size() + if self == Self::I8 { 4 } else { 0 }
    }

    /// `float32`, `float16`, `bfloat16` or `int8`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::Bf16 => "bfloat16",
            Self::I8 => "int8",
        }
    }

    /// The type of keys and values called `name`.
    ///
    /// # Errors
    /// If the name is none of the first three.
    pub fn parse(name: &str) -> Result<Self> {
        match name {
            "float32" => Ok(Self::F32),
            "float16" => Ok(Self::F16),
            "bfloat16" => Ok(Self::Bf16),
            _ => Err(Error::Option {
                name: "dtype",
                expected: "float32, float16 or bfloat16",
                received: name.to_owned(),
            }),
        }
    }
}

/// A page is `[16, key_dim]` keys followed by `[16, value_dim]` values, padded to 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageLayout {
    /// Element type of both halves.
    pub dtype: Dtype,
    /// Elements of a key, at least 1.
    pub key_dim: usize,
    /// Elements of a value; 0 for an index of keys only.
    pub value_dim: usize,
    /// What makes keys similar when they are packed into pages.
    pub packing: Packing,
    /// Whether mean values of sealed pages are kept, for estimates of pages that are not read.
    pub value_means: bool,
    /// Whether sealed keys are coded, one bit per element, so that a search sees single keys: 17 bytes a key of 128.
    /// Not above 1024 dimensions.
    pub key_codes: bool,
}

/// What makes two keys similar.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// A large inner product: right for attention.
    #[default]
    Product,
    /// A small distance: right where queries look for what is near.
    Distance,
}

/// Largest accepted dim: keeps byte counts and integer dot products far from overflow.
const MAX_DIM: usize = 1 << 16;

impl PageLayout {
    /// A checked layout.
    ///
    /// # Errors
    /// If `key_dim` is 0 or a dim exceeds 65536.
    pub fn new(dtype: Dtype, key_dim: usize, value_dim: usize) -> Result<Self> {
        if key_dim == 0 || key_dim > MAX_DIM {
            return Err(Error::Option { name: "key_dim", expected: "1..=65536", received: key_dim.to_string() });
        }
        if dtype == Dtype::I8 && value_dim > 0 {
            return Err(Error::Option { name: "value_dim", expected: "0 for int8", received: value_dim.to_string() });
        }
        if value_dim > MAX_DIM {
            return Err(Error::Option { name: "value_dim", expected: "0..=65536", received: value_dim.to_string() });
        }
        let key_codes = key_dim <= signs::MAX_DIM;
        Ok(Self { dtype, key_dim, value_dim, packing: Packing::Product, value_means: false, key_codes })
    }

    /// The same, packed in another way.
    #[must_use]
    pub fn packed_by(self, packing: Packing) -> Self {
        Self { packing, ..self }
    }

    /// The same, with mean values of sealed pages.
    #[must_use]
    pub fn with_value_means(self) -> Self {
        Self { value_means: true, ..self }
    }

    /// The same without codes of keys: searches rank pages by their means alone.
    #[must_use]
    pub fn without_codes(self) -> Self {
        Self { key_codes: false, ..self }
    }

    /// Bytes of one key.
    #[must_use]
    pub fn key_bytes(&self) -> usize {
        self.dtype.row_bytes(self.key_dim)
    }

    /// Bytes of one value.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        self.value_dim * self.dtype.size()
    }

    /// Bytes of one page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        (PAGE_TOKENS * (self.key_bytes() + self.value_bytes())).next_multiple_of(64)
    }
}
