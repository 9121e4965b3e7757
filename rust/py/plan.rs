//! `PLAN_FORMAT`: the words of plans and results by name, for those who read and write them outside
//! of Rust.

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::plan::words;

/// By kind of record, then by name in lower case: the place of each word, or the value of each flag
/// and status.
pub fn plan_format(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let format = PyDict::new(py);
    for (record, names) in [
        ("header", words::HEADER),
        ("row", words::row::NAMES),
        ("block", words::block::NAMES),
        ("enter", words::enter::NAMES),
        ("copy", words::copy::NAMES),
        ("bias", words::bias::NAMES),
        ("penalty", words::penalty::NAMES),
        ("target", words::target::NAMES),
        ("pool", words::pool::NAMES),
        ("follow", words::follow::NAMES),
        ("target_result", words::target_result::NAMES),
        ("result", words::result::NAMES),
    ] {
        let places = PyDict::new(py);
        for (place, name) in names.iter().enumerate() {
            places.set_item(name.to_lowercase(), place)?;
        }
        format.set_item(record, places)?;
    }
    for (kind, constants) in [("row_flag", words::ROW_FLAGS), ("status", words::STATUSES)] {
        let values = PyDict::new(py);
        for (name, value) in constants {
            let (_, short) = name.split_once('_').expect("constants are named after their kind");
            values.set_item(short.to_lowercase(), value)?;
        }
        format.set_item(kind, values)?;
    }
    Ok(format)
}
