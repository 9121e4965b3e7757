//! The Python binding, `octavo._core`. Only this folder names `pyo3`; `python/octavo/_core.pyi` is its contract.

mod engine;
mod errors;
mod gguf;
mod text;

/// The extension module.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use super::engine::{ChoiceDelta, EngineCore, Plan, RequestDelta, SamplingParams};
    #[pymodule_export]
    use super::errors::{GgufError, KvCapacityError, OverloadedError, PromptTooLongError, TemplateError};
    #[pymodule_export]
    use super::gguf::GgufFile;
    #[pymodule_export]
    use super::text::{ChatTemplate, FrameTemplate, Prompt, Tokenizer};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
