//! Comes with the scheduler.
