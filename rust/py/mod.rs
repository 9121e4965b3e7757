//! The Python binding, `octavo._core`. Only this folder names `pyo3`; `python/octavo/_core.pyi` is
//! its contract.

mod answer;
mod body;
mod core;
mod cpu;
mod delta;
mod errors;
mod event_fd;
mod floats;
mod gguf;
mod grammar;
mod guard;
mod params;
mod pattern;
mod plan;
mod protocol;
mod step;
mod tensor;
mod text;
mod timeline;

/// The extension module.
#[pyo3::pymodule]
mod _core {
    #[pymodule_export]
    use super::answer::AnswerFormat;
    #[pymodule_export]
    use super::body::{measure_body, read_prompts, resolve_escapes};
    #[pymodule_export]
    use super::core::EngineCore;
    #[pymodule_export]
    use super::cpu::{add_rms_norm, gelu_tanh_and_mul, rms_norm, silu_and_mul};
    #[pymodule_export]
    use super::cpu::{cpu_levels, cpu_threads, set_cpu_threads, BlockMatrix, BlockProduct, PagedAttention, PagedRows};
    #[pymodule_export]
    use super::delta::{ChoiceDelta, Failure, ReplyDelta, RequestProgress};
    #[pymodule_export]
    use super::errors::{GgufError, KvCapacityError, OverloadedError, PromptTooLongError, RefusedError, TemplateError};
    #[pymodule_export]
    use super::floats::Floats;
    #[pymodule_export]
    use super::gguf::GgufFile;
    #[pymodule_export]
    use super::grammar::{Grammar, GrammarCompiler, ThinkingBudget};
    #[pymodule_export]
    use super::params::SamplingParams;
    #[pymodule_export]
    use super::pattern::Pattern;
    #[pymodule_export]
    use super::protocol::{anthropic_error, ollama_error, openai_error, tgi_error, Echo, ReplyFormat, TokenIds};
    #[pymodule_export]
    use super::step::{prepare_step, sample_step};
    #[pymodule_export]
    use super::text::{ChatTemplate, Prompt, Tokenizer};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
    #[pymodule_export]
    const ENGINE_DEAD: &str = crate::output::Failure::ENGINE_DEAD;
    #[pymodule_export]
    const SERVER_SHUTTING_DOWN: &str = crate::output::Failure::SERVER_SHUTTING_DOWN;

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        use pyo3::types::PyModuleMethods;
        module.add("PLAN_FORMAT", super::plan::plan_format(module.py())?)
    }
}
