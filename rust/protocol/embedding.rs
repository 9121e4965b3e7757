//! Embeddings: OpenAI's `/v1/embeddings`, vLLM's `/pooling`, Ollama's `/api/embed` and
//! `/api/embeddings`. A vector a prompt, as numbers or as the base64 of their bytes.

use std::io::Write;

use super::json::{write_integer, write_list, write_separated, write_string};
use super::openai::CallHead;
use super::{Delta, Protocol, Usage};
use crate::output::Failure;
use crate::text::Tokenizer;

/// How a vector is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VectorForm {
    /// Numbers, by the fewest digits that make the same 32-bit float again.
    Floats,
    /// Base64 of 32-bit floats, little-endian.
    Base64,
}

/// Whose answer it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmbeddingForm {
    /// `/v1/embeddings`.
    OpenAi(VectorForm),
    /// `/pooling`.
    Pooling(VectorForm),
    /// `/api/embed`.
    Ollama,
    /// `/api/embeddings`, of one prompt.
    OllamaOne,
}

/// One call's.
#[derive(Debug)]
pub(super) struct Embeddings {
    id: String,
    model: String,
    created: u64,
    since: std::time::Instant,
    form: EmbeddingForm,
}

impl Embeddings {
    pub(super) fn new(head: &CallHead<'_>, form: EmbeddingForm) -> Self {
        let CallHead { id, model, created, .. } = *head;
        Self { id: id.to_owned(), model: model.to_owned(), created, since: std::time::Instant::now(), form }
    }

    fn write_list_of(
        &self,
        out: &mut Vec<u8>,
        choices: &[Delta<'_>],
        usage: Usage,
        form: VectorForm,
        is_pooling: bool,
    ) {
        let (object, key) = if is_pooling { ("pooling", "data") } else { ("embedding", "embedding") };
        out.extend_from_slice(b"{\"id\":");
        write_string(out, &self.id);
        out.extend_from_slice(b",\"object\":\"list\",\"created\":");
        write_integer(out, self.created);
        out.extend_from_slice(b",\"model\":");
        write_string(out, &self.model);
        out.extend_from_slice(b",\"data\":");
        write_list(out, choices, |out, choice| {
            out.extend_from_slice(b"{\"index\":");
            write_integer(out, choice.index.into());
            out.extend_from_slice(b",\"object\":");
            write_string(out, object);
            out.push(b',');
            write_string(out, key);
            out.push(b':');
            match form {
                VectorForm::Floats => write_floats(out, vector_of(choice)),
                VectorForm::Base64 => write_base64(out, vector_of(choice)),
            }
            out.push(b'}');
        });
        out.extend_from_slice(b",\"usage\":{\"prompt_tokens\":");
        write_integer(out, usage.prompt_tokens);
        out.extend_from_slice(b",\"total_tokens\":");
        write_integer(out, usage.prompt_tokens);
        out.extend_from_slice(b",\"completion_tokens\":0,\"prompt_tokens_details\":{\"cached_tokens\":");
        write_integer(out, usage.cached_tokens);
        out.extend_from_slice(b"}}}");
    }

    fn write_ollama(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage) {
        out.extend_from_slice(b"{\"model\":");
        write_string(out, &self.model);
        out.extend_from_slice(b",\"embeddings\":");
        write_list(out, choices, |out, choice| write_floats(out, vector_of(choice)));
        out.extend_from_slice(b",\"total_duration\":");
        write_integer(out, self.since.elapsed().as_nanos() as u64);
        out.extend_from_slice(b",\"load_duration\":0,\"prompt_eval_count\":");
        write_integer(out, usage.prompt_tokens);
        out.push(b'}');
    }
}

impl Protocol for Embeddings {
    fn delta(&self, _out: &mut Vec<u8>, _delta: &Delta<'_>, _usage: Usage, _tokenizer: Option<&Tokenizer>) {}

    fn close(&self, _out: &mut Vec<u8>, _usage: Usage) {}

    fn error(&self, _out: &mut Vec<u8>, _failure: &Failure) {}

    fn body(&self, out: &mut Vec<u8>, choices: &[Delta<'_>], usage: Usage, _tokenizer: Option<&Tokenizer>) {
        match self.form {
            EmbeddingForm::OpenAi(form) => self.write_list_of(out, choices, usage, form, false),
            EmbeddingForm::Pooling(form) => self.write_list_of(out, choices, usage, form, true),
            EmbeddingForm::Ollama => self.write_ollama(out, choices, usage),
            EmbeddingForm::OllamaOne => {
                out.extend_from_slice(b"{\"embedding\":");
                write_floats(out, choices.first().map_or(&[], vector_of));
                out.push(b'}');
            }
        }
    }
}

fn vector_of<'a>(choice: &Delta<'a>) -> &'a [f32] {
    choice.vector.unwrap_or_default()
}

/// Appends a list of finite numbers.
fn write_floats(out: &mut Vec<u8>, vector: &[f32]) {
    out.push(b'[');
    write_separated(out, vector, |out, number| write!(out, "{number}").expect("writing to a Vec cannot fail"));
    out.push(b']');
}

/// Appends the bytes of a vector as a JSON string of base64, with its padding.
fn write_base64(out: &mut Vec<u8>, vector: &[f32]) {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|number| number.to_le_bytes()).collect();
    out.push(b'"');
    for group in bytes.chunks(3) {
        let byte = |place: usize| u32::from(group.get(place).copied().unwrap_or(0));
        let word = byte(0) << 16 | byte(1) << 8 | byte(2);
        let digits = [18, 12, 6, 0].map(|shift| DIGITS[(word >> shift) as usize % 64]);
        out.extend_from_slice(&digits[..=group.len()]);
        out.extend_from_slice(&b"=="[..3 - group.len()]);
    }
    out.push(b'"');
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{json, Value};

    const HEAD: CallHead<'_> = CallHead { id: "embd-1", model: "m", created: 17, timing: false };

    fn written(form: EmbeddingForm) -> Value {
        let first = [1.0f32, -0.5, 1.0e-8];
        let choices = [
            Delta { index: 0, vector: Some(&first), ..Delta::default() },
            Delta { index: 1, vector: Some(&[0.1]), ..Delta::default() },
        ];
        let usage = Usage { prompt_tokens: 7, cached_tokens: 4, ..Usage::default() };
        let mut out = Vec::new();
        Embeddings::new(&HEAD, form).body(&mut out, &choices, usage, None);
        serde_json::from_slice(&out).expect("JSON")
    }

    #[test]
    fn openai_has_a_vector_a_prompt_and_the_usage() {
        let usage = json!({"prompt_tokens": 7, "total_tokens": 7, "completion_tokens": 0,
            "prompt_tokens_details": {"cached_tokens": 4}});
        assert_eq!(
            written(EmbeddingForm::OpenAi(VectorForm::Floats)),
            json!({"id": "embd-1", "object": "list", "created": 17, "model": "m", "data": [
                {"index": 0, "object": "embedding", "embedding": [1, -0.5, 0.000_000_01]},
                {"index": 1, "object": "embedding", "embedding": [0.1]},
            ], "usage": usage})
        );
        let pooling = written(EmbeddingForm::Pooling(VectorForm::Base64));
        assert_eq!(pooling["data"][1], json!({"index": 1, "object": "pooling", "data": "zczMPQ=="}));
        assert_eq!(pooling["data"][0]["data"], json!("AACAPwAAAL93zCsy"));
    }

    #[test]
    fn ollama_has_lists_of_numbers() {
        let mut whole = written(EmbeddingForm::Ollama);
        assert!(whole["total_duration"].take().is_u64());
        assert_eq!(
            whole,
            json!({"model": "m", "embeddings": [[1, -0.5, 0.000_000_01], [0.1]], "total_duration": null,
                "load_duration": 0, "prompt_eval_count": 7})
        );
        assert_eq!(written(EmbeddingForm::OllamaOne), json!({"embedding": [1, -0.5, 0.000_000_01]}));
    }
}
