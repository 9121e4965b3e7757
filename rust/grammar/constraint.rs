//! A constraint as users write it, and its bounds.

use llguidance::api::TopLevelGrammar;

use super::choice;
use super::gbnf;
use super::schema;
use crate::error::{Error, Result};

/// Most bytes of a constraint's text.
pub const MAX_TEXT: usize = 256 * 1024;
/// Deepest brackets of a regular expression or grammar: compilers go down by recursion.
const MAX_NESTING: usize = 200;

/// What kind of text a constraint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConstraintKind {
    /// A JSON schema.
    Json,
    /// Any JSON object.
    JsonObject,
    /// A regular expression that the whole answer matches.
    Regex,
    /// A JSON list of texts, one of which is the answer.
    Choice,
    /// A grammar in Lark's form, or in GBNF.
    Grammar,
}

/// Which white space JSON may have between its parts.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub enum Whitespace {
    /// A space, or line breaks with up to twenty blanks. Without a bound, a model that is unsure
    /// writes blanks until its tokens run out.
    #[default]
    Bounded,
    /// None at all.
    Never,
    /// What matches this regular expression, or nothing.
    Pattern(String),
}

impl Whitespace {
    /// The regular expression; None: no white space.
    pub(super) fn pattern(&self) -> Option<&str> {
        match self {
            Self::Bounded => Some(r" |\n\n?[ \t]{0,20}"),
            Self::Never => None,
            Self::Pattern(pattern) => Some(pattern),
        }
    }
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Constraint {
    /// What `text` is.
    pub kind: ConstraintKind,
    /// The schema, expression, list or grammar; nothing for [`ConstraintKind::JsonObject`].
    pub text: String,
    /// Of JSON; other kinds say themselves where white space may be.
    pub whitespace: Whitespace,
}

impl ConstraintKind {
    /// By its name among users.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "json" => Self::Json,
            "json_object" => Self::JsonObject,
            "regex" => Self::Regex,
            "choice" => Self::Choice,
            "grammar" => Self::Grammar,
            _ => return None,
        })
    }

    /// Its name among users, with the field that it stands in.
    pub fn field(self) -> &'static str {
        match self {
            Self::Json => "structured_outputs.json",
            Self::JsonObject => "structured_outputs.json_object",
            Self::Regex => "structured_outputs.regex",
            Self::Choice => "structured_outputs.choice",
            Self::Grammar => "structured_outputs.grammar",
        }
    }

    /// An error of a constraint of this kind.
    pub(super) fn invalid(self, reason: impl std::fmt::Display) -> Error {
        let code = if self == Self::Json { "invalid_schema" } else { "invalid_grammar" };
        Error::Constraint { code, field: self.field(), message: tidy(&reason.to_string()) }
    }

    /// An error of one that is over a limit.
    pub(super) fn too_complex(self, reason: impl std::fmt::Display) -> Error {
        Error::Constraint { code: "grammar_too_complex", field: self.field(), message: tidy(&reason.to_string()) }
    }
}

impl Constraint {
    /// Checks the bounds, and makes of it what `llguidance` reads.
    ///
    /// # Errors
    /// [`Error::Constraint`].
    pub(super) fn prepared(&self) -> Result<TopLevelGrammar> {
        let kind = self.kind;
        if self.text.len() > MAX_TEXT {
            return Err(kind.too_complex(format!("has {} bytes, but must have at most {MAX_TEXT}", self.text.len())));
        }
        match kind {
            ConstraintKind::Json => {
                let schema = schema::read(&self.text)?;
                Ok(TopLevelGrammar::from_json_schema(schema::with_options(schema, &self.whitespace)))
            }
            ConstraintKind::JsonObject => {
                let schema = serde_json::json!({"type": "object"});
                Ok(TopLevelGrammar::from_json_schema(schema::with_options(schema, &self.whitespace)))
            }
            ConstraintKind::Regex => {
                check_nesting(kind, &self.text)?;
                if self.text.is_empty() {
                    return Err(kind.invalid("is empty: no answer but the empty one would match"));
                }
                Ok(TopLevelGrammar::from_regex(&self.text))
            }
            ConstraintKind::Choice => choice::grammar(&self.text),
            ConstraintKind::Grammar => {
                check_nesting(kind, &self.text)?;
                if self.text.trim().is_empty() {
                    return Err(kind.invalid("is empty"));
                }
                let is_gbnf = gbnf::is_gbnf(&self.text);
                Ok(TopLevelGrammar::from_lark(if is_gbnf { gbnf::to_lark(&self.text)? } else { self.text.clone() }))
            }
        }
    }
}

/// Refuses brackets deeper than [`MAX_NESTING`], counted without an eye for quotes and escapes.
fn check_nesting(kind: ConstraintKind, text: &str) -> Result<()> {
    let (mut depth, mut deepest) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    if deepest > MAX_NESTING {
        return Err(
            kind.too_complex(format!("has brackets {deepest} deep, but they must be at most {MAX_NESTING} deep"))
        );
    }
    Ok(())
}

/// A message of the library in one line of bounded length, without the parts that are not for users.
fn tidy(message: &str) -> String {
    const LONGEST: usize = 300;
    let message = message.split("\n<").next().unwrap_or_default().trim();
    let message = if message.contains("NoExtension") {
        "allows no answer at all".to_owned()
    } else {
        match message.split_once("regex parse error:\n") {
            Some((before, shown)) => format!("{}{}", before_regex(before), regex_fault(shown)),
            None => message.lines().next().unwrap_or_default().to_owned(),
        }
    };
    match message.char_indices().nth(LONGEST) {
        Some((end, _)) => format!("{}...", &message[..end]),
        None => message,
    }
}

/// What stands before a regular expression's fault, but for the expression itself.
fn before_regex(before: &str) -> &str {
    before.find("invalid regex").map_or(before, |start| &before[..start])
}

/// The fault of a regular expression, with the text at which it is: the library shows both on lines
/// of their own, the place by carets.
fn regex_fault(shown: &str) -> String {
    let fault = shown.lines().find_map(|line| line.trim().strip_prefix("error: ")).unwrap_or("it cannot be read");
    let marked = shown.lines().position(|line| line.contains('^') && line.trim().bytes().all(|byte| byte == b'^'));
    let place = marked.and_then(|line| {
        let column = shown.lines().nth(line)?.find('^')?;
        let pattern = shown.lines().nth(line.checked_sub(1)?)?;
        Some(pattern.chars().skip(column).take(30).collect::<String>())
    });
    match place {
        Some(place) => format!("not a regular expression, at {place:?}: {fault}"),
        None => format!("not a regular expression: {fault}"),
    }
}
