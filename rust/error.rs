//! The crate's one error type. What a user can cause is an `Error`; a broken invariant of our own
//! is a panic.

/// Everything that can be refused. The text names the field or file, the value, the limit and what
/// to do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A field of a configuration or of the sampling parameters is out of its range.
    #[error("{field} is {value}, but must be {limit}")]
    InvalidValue {
        /// Name of the field as users write it.
        field: &'static str,
        /// The offending value, shortened where it could be long.
        value: String,
        /// The range that is allowed.
        limit: String,
    },
    /// The prompt holds no token.
    #[error("prompt has 0 tokens, but must have at least 1")]
    EmptyPrompt,
    /// A token id that the model's vocabulary does not have.
    #[error("{field} holds token id {token} at index {index}, but ids must be from 0 to {}", .vocab_size - 1)]
    TokenOutOfRange {
        /// `prompt`, `stop_token_ids`, `logit_bias` or `drafts`.
        field: &'static str,
        /// Position inside that field.
        index: usize,
        /// The offending id.
        token: u32,
        /// Number of ids of the vocabulary.
        vocab_size: u32,
    },
    /// Prompt and output together are longer than the model's context.
    #[error(
        "prompt is too long: this model's maximum context length is {max_model_len} tokens; the prompt has {prompt_len} \
         and max_tokens is {max_tokens}, but together they must be at most max_model_len = {max_model_len}: shorten the \
         prompt or lower max_tokens"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_len: usize,
        /// Output tokens asked for; 1 where the request left it open.
        max_tokens: u64,
        /// The limit.
        max_model_len: u32,
    },
    /// The request is larger than the whole KV pool, so it could wait for ever.
    #[error(
        "prompt has {prompt_len} tokens and max_tokens is {max_tokens}, but the KV cache holds at most {limit} tokens \
         of one request: shorten it, or give the server more KV memory"
    )]
    KvCapacity {
        /// Tokens of the prompt.
        prompt_len: usize,
        /// Output tokens asked for; 1 where the request left it open.
        max_tokens: u64,
        /// Longest prompt plus output that fits.
        limit: u32,
    },
    /// The waiting queue is full.
    #[error("the waiting queue, of at most max_waiting = {limit} requests, has no room: retry later")]
    QueueFull {
        /// The configured bound.
        limit: usize,
    },
    /// The caller broke the protocol of steps: planned a third one, or committed one that is not
    /// the oldest.
    #[error("step {step_id}: {reason}")]
    StepOrder {
        /// The step that was named, or would have been planned.
        step_id: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A plan or result buffer is smaller than the bytes it has to hold.
    #[error("the {what} buffer has {len} bytes, but must have at least {needed}")]
    BufferTooSmall {
        /// `plan` or `result`.
        what: &'static str,
        /// Its size.
        len: usize,
        /// The size it must have.
        needed: usize,
    },
    /// A tokenizer file or vocabulary that cannot be used, or text that cannot be tokenised.
    #[error("{0}")]
    Tokenizer(String),
    /// A chat template does not parse, ran out of fuel, or refused the messages.
    #[error("{0}")]
    Template(String),
    /// A chat template makes more of the messages than is read.
    #[error("the chat template makes more than {limit} characters of the messages")]
    RenderedTooLong {
        /// Most characters.
        limit: usize,
    },
    /// A GGUF file is truncated or inconsistent.
    #[error("{0}")]
    Gguf(String),
    /// A panic in text work, by which a library's own check failed, or ours.
    #[error("a text library panicked: {0}")]
    Panicked(String),
    /// A schema, regular expression, list of choices or grammar for the answer cannot be used.
    #[error("{field} {message}")]
    Constraint {
        /// As in [`Error::code`].
        code: &'static str,
        /// Its field.
        field: &'static str,
        /// What is wrong, and where in it.
        message: String,
    },
    /// The body of an HTTP request holds something else than it should, or too much of it.
    #[error("{message}")]
    Body {
        /// As in [`Error::code`].
        code: &'static str,
        /// The field of the request, where there is one.
        param: Option<String>,
        /// What is wrong.
        message: String,
    },
}

/// Result of whatever a user can reach.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Short stable name, for the `code` field of an HTTP error and the label of a metric.
    pub fn code(&self) -> &'static str {
        match self {
            Self::InvalidValue { .. } | Self::EmptyPrompt | Self::Tokenizer(_) => "invalid_value",
            Self::TokenOutOfRange { .. } => "token_id_out_of_range",
            Self::PromptTooLong { .. } | Self::RenderedTooLong { .. } => "context_length_exceeded",
            Self::KvCapacity { .. } => "kv_capacity_exceeded",
            Self::QueueFull { .. } => "queue_full",
            Self::Template(_) => "template_error",
            Self::Gguf(_) => "invalid_gguf",
            Self::StepOrder { .. } | Self::BufferTooSmall { .. } | Self::Panicked(_) => "internal_error",
            Self::Constraint { code, .. } | Self::Body { code, .. } => code,
        }
    }

    /// What the error is about, as users write it: a field of a request or of the configuration.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::InvalidValue { field, .. } | Self::TokenOutOfRange { field, .. } | Self::Constraint { field, .. } => {
                Some(field)
            }
            Self::EmptyPrompt | Self::PromptTooLong { .. } | Self::KvCapacity { .. } => Some("prompt"),
            Self::Template(_) | Self::RenderedTooLong { .. } => Some("messages"),
            Self::Body { param, .. } => param.as_deref(),
            Self::QueueFull { .. }
            | Self::StepOrder { .. }
            | Self::BufferTooSmall { .. }
            | Self::Tokenizer(_)
            | Self::Gguf(_)
            | Self::Panicked(_) => None,
        }
    }

    /// An [`Error::Body`].
    pub(crate) fn body(code: &'static str, param: Option<String>, message: String) -> Self {
        Self::Body { code, param, message }
    }

    /// An [`Error::InvalidValue`]; long values are cut, so that a message never echoes a megabyte.
    #[allow(clippy::needless_pass_by_value)] // Callers give numbers and strings made for the message.
    pub(crate) fn invalid(field: &'static str, value: impl ToString, limit: impl ToString) -> Self {
        let mut value = value.to_string();
        if let Some((cut, _)) = value.char_indices().nth(100) {
            value.truncate(cut);
            value.push_str("...");
        }
        Self::InvalidValue { field, value, limit: limit.to_string() }
    }
}
