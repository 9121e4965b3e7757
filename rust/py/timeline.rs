//! The stories of requests, as dictionaries.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::output::FinishReason;
use crate::timeline::{Cause, Event, Story};

/// A dictionary of counts, and `events`: a list of dictionaries. Times are seconds of the caller's
/// clock.
pub(super) fn story<'py>(py: Python<'py>, story: &Story) -> PyResult<Bound<'py, PyDict>> {
    let entries = PyDict::new(py);
    let progress = &story.progress;
    entries.set_item("has_ended", story.has_ended)?;
    entries.set_item("prompt_tokens", progress.num_prompt_tokens)?;
    entries.set_item("cached_tokens", progress.num_cached_tokens)?;
    entries.set_item("output_tokens", progress.num_output_tokens)?;
    entries.set_item("preemptions", progress.num_preemptions)?;
    entries.set_item("added", progress.added)?;
    let events: Vec<Bound<'py, PyDict>> =
        story.events.iter().map(|(choice, told)| event(py, *choice, told)).collect::<PyResult<_>>()?;
    entries.set_item("events", events)?;
    Ok(entries)
}

fn event<'py>(py: Python<'py>, choice: u32, told: &Event) -> PyResult<Bound<'py, PyDict>> {
    let entries = PyDict::new(py);
    let name = match told {
        Event::Queued { .. } => "queued",
        Event::Computed { .. } => "prompt_chunk",
        Event::Decoded { .. } => "decode",
        Event::Preempted { .. } => "preempted",
        Event::Ended { .. } => "ended",
    };
    entries.set_item("event", name)?;
    entries.set_item("choice", choice)?;
    match *told {
        Event::Queued { from, until, by, cached } => {
            entries.set_item("from", from)?;
            entries.set_item("until", until)?;
            let waited = PyDict::new(py);
            for (cause, seconds) in Cause::ALL.iter().zip(by).filter(|(_, seconds)| *seconds > 0.0) {
                waited.set_item(cause.as_str(), seconds)?;
            }
            entries.set_item("by", waited)?;
            entries.set_item("admitted", cached.is_some())?;
            entries.set_item("cached_tokens", cached.unwrap_or_default())?;
        }
        Event::Computed { from, until, tokens, drawn } => {
            entries.set_item("from", from)?;
            entries.set_item("until", until)?;
            entries.set_item("tokens", tokens)?;
            entries.set_item("output_tokens", drawn)?;
        }
        Event::Decoded { from, until, steps, tokens } => {
            entries.set_item("from", from)?;
            entries.set_item("until", until)?;
            entries.set_item("steps", steps)?;
            entries.set_item("output_tokens", tokens)?;
        }
        Event::Preempted { at, tokens } => {
            entries.set_item("from", at)?;
            entries.set_item("until", at)?;
            entries.set_item("tokens", tokens)?;
        }
        Event::Ended { at, reason } => {
            entries.set_item("from", at)?;
            entries.set_item("until", at)?;
            let reason = match reason {
                FinishReason::Error(error) => error.code(),
                other => other.as_str(),
            };
            entries.set_item("reason", reason)?;
        }
    }
    Ok(entries)
}
