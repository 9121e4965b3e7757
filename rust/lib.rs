//! Core of Octavo.

pub mod error;
pub mod text;
