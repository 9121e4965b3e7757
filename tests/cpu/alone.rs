//! `rust/cpu` as a crate of its own, which is what `make asan` builds: it needs no other.
#![allow(missing_docs)]

#[path = "../../rust/cpu/mod.rs"]
pub mod cpu;
