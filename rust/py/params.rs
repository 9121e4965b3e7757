//! `SamplingParams`: the parameters of a request, checked when they are made.

use std::sync::Arc;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use super::grammar::{self, Grammar, ThinkingBudget};
use crate::request::{self, Pooling, PoolingKind, SamplingOptions};

/// Checked sampling parameters in the form the scheduler uses.
#[pyclass(frozen, module = "octavo._core")]
pub struct SamplingParams(pub(super) request::SamplingParams);

#[pymethods]
impl SamplingParams {
    #[new]
    #[pyo3(signature = (*, n=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, seed=None, max_tokens=None, max_tokens_is_default=false,
        min_tokens=0, ignore_eos=false, stop=vec![], stop_token_ids=vec![], include_stop_str_in_output=false, skip_special_tokens=true,
        detokenize=true, logprobs=None, prompt_logprobs=None, logit_bias=vec![], allowed_token_ids=None, bad_words=vec![], thinking=None,
        grammar=None))]
    #[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // All are keywords in Python.
    fn new(
        n: i64,
        temperature: f64,
        top_k: i64,
        top_p: f64,
        min_p: f64,
        repetition_penalty: f64,
        presence_penalty: f64,
        frequency_penalty: f64,
        seed: Option<i64>,
        max_tokens: Option<i64>,
        max_tokens_is_default: bool,
        min_tokens: i64,
        ignore_eos: bool,
        stop: Vec<String>,
        stop_token_ids: Vec<i64>,
        include_stop_str_in_output: bool,
        skip_special_tokens: bool,
        detokenize: bool,
        logprobs: Option<i64>,
        prompt_logprobs: Option<i64>,
        logit_bias: Vec<(i64, f64)>,
        allowed_token_ids: Option<Vec<i64>>,
        bad_words: Vec<Vec<u32>>,
        thinking: Option<&ThinkingBudget>,
        grammar: Option<&Bound<'_, Grammar>>,
    ) -> PyResult<Self> {
        let options = SamplingOptions {
            n,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            presence_penalty,
            frequency_penalty,
            seed: seed.map(|seed| seed as u64),
            max_tokens,
            max_tokens_is_default,
            min_tokens,
            ignore_eos,
            stop,
            stop_token_ids,
            include_stop_str_in_output,
            skip_special_tokens,
            detokenize,
            logprobs,
            prompt_logprobs,
            logit_bias,
            allowed_token_ids,
            bad_words,
            thinking: thinking.map(|thinking| Arc::clone(&thinking.0)),
            grammar: grammar::shared(grammar),
        };
        Ok(Self(request::SamplingParams::new(options)?))
    }

    /// Those of a request for an embedding.
    #[staticmethod]
    #[pyo3(signature = (*, pooling, normalize = true, dimensions = None))]
    fn embedding(pooling: &str, normalize: bool, dimensions: Option<u32>) -> PyResult<Self> {
        let kind = match pooling {
            "last" => PoolingKind::Last,
            "mean" => PoolingKind::Mean,
            other => return Err(PyValueError::new_err(format!("pooling is {other:?}, but must be last or mean"))),
        };
        Ok(Self(request::SamplingParams::embedding(Pooling { kind, normalize, dimensions })))
    }
}
