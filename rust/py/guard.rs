//! Panics of text work end here. Files and texts reach code that is not ours (`tokenizers`,
//! `minijinja`), and a panic that passed on into Python would be a `BaseException`, which no handler
//! of a request or of a load expects.

use std::any::Any;
use std::cell::Cell;
use std::panic::{catch_unwind, set_hook, take_hook, AssertUnwindSafe};
use std::sync::Once;

use pyo3::prelude::*;

use crate::error::{Error, Result};

thread_local! {
    /// This thread's panics become errors.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Runs text work without the GIL. What it is given must be immutable, so that nothing half done is
/// left behind where it panics.
pub(super) fn detached<T: Send>(py: Python<'_>, work: impl Send + FnOnce() -> Result<T>) -> PyResult<T> {
    Ok(py.detach(|| guarded(work))?)
}

/// Runs `work`; a panic in it is [`Error::Panicked`].
pub(super) fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    quiet_guarded_panics();
    GUARDED.set(true);
    let result = catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(false);
    result.unwrap_or_else(|panic| Err(Error::Panicked(message(&*panic))))
}

/// The error tells of a guarded panic; the standard error need not do so as well.
fn quiet_guarded_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = take_hook();
        set_hook(Box::new(move |panic| {
            if !GUARDED.get() {
                report(panic);
            }
        }));
    });
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
    text.unwrap_or("no reason given").to_owned()
}
