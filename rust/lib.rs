//! Core of Octavo.
