//! In which form models write calls of tools and reasoning, and which form a template shows.

/// A form of calls. Names are those of vLLM's `--tool-call-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`, one element a call: Hermes,
    /// Qwen 2.5, Qwen 3, `SmolLM2`.
    Hermes,
    /// `{"name": ..., "parameters": {...}}` that begins the answer, or stands behind
    /// `<|python_tag|>`; several with `;` between them: Llama 3.
    Llama3,
    /// `[TOOL_CALLS]`, then a list of `{"name": ..., "arguments": {...}}`, or `name{...}`, or
    /// `name[ARGS]{...}`: Mistral.
    Mistral,
    /// `{"name": ..., "parameters": {...}}` that begins the answer, or stands in a fence of
    /// `json`, `tool_code` or `tool_call`: Gemma.
    Gemma,
}

impl CallFormat {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Hermes, Self::Llama3, Self::Mistral, Self::Gemma];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hermes => "hermes",
            Self::Llama3 => "llama3_json",
            Self::Mistral => "mistral",
            Self::Gemma => "gemma",
        }
    }

    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The format that a chat template shows its model, if it is one of these.
    pub fn of_template(source: &str) -> Option<Self> {
        let has = |text: &str| source.contains(text);
        if has("<function=") {
            None // Qwen's coders write XML
        } else if has("<tool_call>") {
            Some(Self::Hermes)
        } else if has("[TOOL_CALLS]") {
            Some(Self::Mistral)
        } else if has("<|python_tag|>")
            || (has("\"parameters\":") && (has("<|start_header_id|>") || has("<|header_start|>")))
        {
            Some(Self::Llama3)
        } else if has("<start_of_turn>") {
            Some(Self::Gemma)
        } else {
            None
        }
    }

    /// Markers that begin a call; none has blanks in it, and none begins another.
    pub fn opens(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["<tool_call>"],
            Self::Llama3 => &["<|python_tag|>"],
            Self::Mistral => &["[TOOL_CALLS]"],
            Self::Gemma => &["```json", "```tool_code", "```tool_call"],
        }
    }

    /// Markers that end a call.
    pub(super) fn closes(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => &["</tool_call>"],
            Self::Gemma => &["```"],
            Self::Llama3 | Self::Mistral => &[],
        }
    }

    /// A call may begin the answer without a marker, or look like other JSON in spite of it. It
    /// must name one of the tools.
    pub(super) fn is_bare(self) -> bool {
        matches!(self, Self::Llama3 | Self::Gemma)
    }

    /// The name may stand before the arguments, outside of JSON.
    pub(super) fn has_outer_names(self) -> bool {
        self == Self::Mistral
    }
}

/// What stands around a model's reasoning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReasoningTags {
    /// Before it.
    pub open: &'static str,
    /// Behind it.
    pub close: &'static str,
}

impl ReasoningTags {
    const THINK: Self = Self { open: "<think>", close: "</think>" };
    const MAGISTRAL: Self = Self { open: "[THINK]", close: "[/THINK]" };

    /// By name: `think` for `<think>`, `mistral` for `[THINK]`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "think" => Some(Self::THINK),
            "mistral" => Some(Self::MAGISTRAL),
            _ => None,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        if self == Self::THINK {
            "think"
        } else {
            "mistral"
        }
    }

    /// The tags that a template, or whoever `has` texts, shows.
    pub fn of(has: impl Fn(&str) -> bool) -> Option<Self> {
        [Self::THINK, Self::MAGISTRAL].into_iter().find(|tags| has(tags.close))
    }
}
